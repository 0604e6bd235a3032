"""What torchtitan's keys mean for FLUX, and which of them mean nothing here.

Our own keys say it below their fields, in job_config.py.
"""

NOT_USED = {
    "model.hf_assets_path": "tokenizers lie beside the encoders that [encoder] names, and weights "
    "to begin from are checkpoint.initial_load_path",
    "model.tokenizer_path": "tokenizers lie beside the encoders that [encoder] names",
    "training.seq_len": "the number of tokens follows from training.img_size and "
    "encoder.max_t5_encoding_len",
    "validation.seq_len": "the number of tokens follows from training.img_size and "
    "encoder.max_t5_encoding_len",
    "validation.enable_classifier_free_guidance": "[sampling] draws pictures",
    "validation.classifier_free_guidance_scale": "[sampling] draws pictures",
    "validation.denoising_steps": "[sampling] draws pictures",
    "validation.save_img_count": "[sampling] draws pictures",
    "validation.save_img_folder": "[sampling] draws pictures",
    "validation.eval_freq": "validation.freq counts",
    "parallelism.disable_loss_parallel": "the loss of FLUX is not cut by tensor parallelism",
    "parallelism.context_parallel_load_balancer": "without a causal mask ranks have equal work",
    "parallelism.context_parallel_rotate_method": "context parallelism exchanges heads (Ulysses)",
    "parallelism.pipeline_parallel_expert_parallel_overlap": "FLUX has no experts",
    "parallelism.expert_tensor_parallel_degree": "FLUX has no experts",
    "parallelism.expert_parallel_comm_backend": "FLUX has no experts",
    "quantize.grouped_mm.float8.fqns": "FLUX has no experts",
    "quantize.grouped_mm.mx.recipe_name": "FLUX has no experts",
    "quantize.grouped_mm.mx.fqns": "FLUX has no experts",
    "debug.moe_force_load_balance": "FLUX has no experts",
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": "FLUX has no experts",
    "memory_estimation.disable_fake_mode": "scripts/plan.py estimates memory",
    "checkpoint.enable_ft_dataloader_checkpoints": "there is no torchft here, and the position in "
    "the data is part of every checkpoint",
    "fault_tolerance.process_group": "there is no torchft here",
    "fault_tolerance.process_group_timeout_ms": "there is no torchft here",
    "fault_tolerance.replica_id": "there is no torchft here",
    "fault_tolerance.group_size": "there is no torchft here",
    "fault_tolerance.min_replica_size": "there is no torchft here",
    "fault_tolerance.semi_sync_method": "there is no torchft here",
    "experimental.custom_args_module": "job.custom_config_module names a module of own sections",
}
"""Keys that are taken and do nothing, with the reason; a run that sets one says so."""

NOT_AVAILABLE = {
    "optimizer.early_step_in_backward": "gradients could not be clipped",
    "parallelism.enable_async_tensor_parallel": "it needs sequence parallel activations",
    "parallelism.module_fqns_per_model_part": "stages have equally many blocks",
    "parallelism.pipeline_parallel_layers_per_stage": "stages have equally many blocks",
    "parallelism.pipeline_parallel_first_stage_less_layers": "stages have equally many blocks",
    "parallelism.pipeline_parallel_last_stage_less_layers": "stages have equally many blocks",
    "parallelism.pipeline_parallel_schedule_csv": "schedules are not read from files",
    "parallelism.expert_parallel_degree": "FLUX has no experts",
    "checkpoint.initial_load_in_hf_quantized": "scaled float8 is read without it, else nothing",
    "activation_checkpoint.visualize_memory_budget_pareto": "nobody asked for it yet",
    "memory_estimation.enable": "scripts/plan.py estimates memory",
    "fault_tolerance.enable": "there is no torchft here",
    "comm.mode": "scripts/plan.py tries meshes without ranks",
}
"""Keys that are refused unless they have their default, with the reason."""

USED = {
    "job.config_file": "TOML file to read; on the command line only",
    "job.dump_folder": "Folder for everything that the run writes",
    "job.custom_config_module": "Python module whose JobConfig adds sections or keys; torchtitan's "
    "own name for its FLUX sections means ours, which are always there",
    "metrics.save_for_all_ranks": "Every rank writes TensorBoard files, not only the first",
    "model.converters": 'Computation in 8 bits: "quantize.linear.float8" or "quantize.linear.mx"',
    "optimizer.name": "AdamW, Adam, AdamW8bit or Adafactor",
    "optimizer.beta1": "Decay of the mean of gradients",
    "optimizer.implementation": "Kernels of the optimizer: fused is the fastest",
    "lr_scheduler.decay_ratio": "Share of the steps, at the end, in which the learning rate falls; "
    "unset: from the end of warm-up on",
    "training.dataset_path": "Folder, file or pattern of the data set's files",
    "training.global_batch_size": "Images in a step, over all ranks; more than the ranks hold at "
    "once are accumulated. -1: training.local_batch_size on every rank that reads data",
    "training.dtype": "Type of parameters; bfloat16 with stochastic rounding (AdamW, AdamW8bit)",
    "training.mixed_precision_param": "Type of computation. Where there is no GPU: float32, unless "
    "this key is set",
    "training.mixed_precision_reduce": "Type in which gradients are summed over ranks",
    "training.gc_debug": "Collect it in every step, to find cycles that hold tensors (GPU only)",
    "training.dataloader.num_workers": "Processes of each rank that read and decode images; 0 does "
    "it in a thread",
    "parallelism.data_parallel_replicate_degree": "Replicas of the model: DDP, and with sharding "
    "HSDP",
    "parallelism.data_parallel_shard_degree": "Ranks that a replica's parameters, gradients and "
    "optimizer are sharded over (FSDP); -1 takes the ranks that are left",
    "parallelism.fsdp_reshard_after_forward": "Whether gathered parameters are given up after the "
    "forward pass; default: where they are sharded or offloaded, except in a pipeline",
    "parallelism.tensor_parallel_degree": "Ranks that share the heads and the MLP of every block",
    "parallelism.pipeline_parallel_degree": "Ranks that hold the stages of the model",
    "parallelism.pipeline_parallel_schedule": "GPipe, 1F1B, Interleaved1F1B or ZBVZeroBubble",
    "parallelism.pipeline_parallel_microbatch_size": "Images of a microbatch of the pipeline; "
    "divides training.local_batch_size",
    "parallelism.context_parallel_degree": "Ranks that share the tokens of every sample (Ulysses)",
    "checkpoint.enable": "Save checkpoints, and continue from the newest one that is complete",
    "checkpoint.initial_load_path": "Checkpoint that a new run begins from",
    "checkpoint.initial_load_model_only": "Take weights alone from it; false continues its run, "
    "with optimizer, schedule and position in the data",
    "checkpoint.initial_load_in_hf": "checkpoint.initial_load_path is a diffusers folder or a "
    "safetensors file",
    "checkpoint.last_save_in_hf": "Write the last checkpoint as a diffusers folder",
    "checkpoint.export_dtype": "Type of weights in a last checkpoint that holds weights alone; "
    "where it cannot hold a value, they keep theirs, and the log names them",
    "checkpoint.async_mode": "Write checkpoints while training goes on",
    "checkpoint.keep_latest_k": "Keep so many checkpoints; 0 keeps all",
    "checkpoint.exclude_from_loading": "Parts of a checkpoint that begin anew, at every start: "
    "model, optimizer, lr_scheduler, dataloader",
    "checkpoint.create_seed_checkpoint": "Save the initial weights as step 0, and leave",
    "activation_checkpoint.selective_ac_option": '"N" recomputes every N-th block, "op" all but '
    "matrix products, attention and what came from other ranks",
    "compile.backend": "Backend of torch.compile",
    "quantize.linear.mx.mxfp8_dim1_cast_kernel_choice": "Kernel that casts columns",
    "quantize.linear.mx.recipe_name": "mxfp8_cublas or mxfp8_cublas_rceil",
    "comm.trace_buf_size": "Collectives that are recorded for a post-mortem; 0 where there is no "
    "GPU, unless this key is set",
    "validation.enable": "Measure the loss on held-out data",
    "validation.dataset_path": "Folder, file or pattern of the held-out data's files",
    "validation.local_batch_size": "Images that a rank measures at once",
    "validation.freq": "Measure every so many steps, and at the last",
    "validation.steps": "Batches over all ranks; -1 takes all held-out data",
    "debug.seed": "Seed of everything random; unset: drawn once, logged and kept in checkpoints",
}

MEANINGS = {
    **USED,
    **{key: f"Not used: {reason}" for key, reason in NOT_USED.items()},
    **{key: f"Not available: {reason}" for key, reason in NOT_AVAILABLE.items()},
}
"""Key -> meaning; these stand before what the fields themselves say."""
