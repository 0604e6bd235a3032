"""What torchtitan's keys mean for FLUX, and which of them mean nothing here.

Our own keys say it below their fields, in job_config.py.
"""

_NOT_USED = {
    "tokenizers lie beside the encoders that [encoder] names, and weights to begin from are "
    "checkpoint.initial_load_path": "model.hf_assets_path model.tokenizer_path",
    "training.img_size and encoder.max_t5_encoding_len make the tokens": "training.seq_len "
    "validation.seq_len",
    "[sampling] draws pictures": "validation.enable_classifier_free_guidance "
    "validation.classifier_free_guidance_scale validation.denoising_steps "
    "validation.save_img_count validation.save_img_folder",
    "validation.freq counts": "validation.eval_freq",
    "the loss of FLUX is not cut by tensor parallelism": "parallelism.disable_loss_parallel",
    "ranks exchange heads (Ulysses)": "parallelism.context_parallel_load_balancer "
    "parallelism.context_parallel_rotate_method",
    "FLUX has no experts": "parallelism.pipeline_parallel_expert_parallel_overlap "
    "parallelism.expert_tensor_parallel_degree parallelism.expert_parallel_comm_backend "
    "quantize.grouped_mm.float8.fqns quantize.grouped_mm.mx.recipe_name "
    "quantize.grouped_mm.mx.fqns debug.moe_force_load_balance "
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns",
    "scripts/plan.py estimates memory": "memory_estimation.disable_fake_mode",
    "there is no torchft here": "checkpoint.enable_ft_dataloader_checkpoints "
    "fault_tolerance.process_group fault_tolerance.process_group_timeout_ms "
    "fault_tolerance.replica_id fault_tolerance.group_size fault_tolerance.min_replica_size "
    "fault_tolerance.semi_sync_method",
    "no arguments are added": "experimental.custom_args_module",
}
NOT_USED = {key: reason for reason, keys in _NOT_USED.items() for key in keys.split()}
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
    "job.custom_config_module": "torchtitan's name for its FLUX sections, which are always there",
    "model.converters": 'Computation in 8 bits: "quantize.linear.float8" or "quantize.linear.mx"',
    "optimizer.name": "AdamW, Adam, AdamW8bit or Adafactor",
    "optimizer.beta1": "Decay of the mean of gradients",
    "lr_scheduler.decay_ratio": "Share of the steps, at the end, in which the learning rate falls; "
    "unset: from the end of warm-up on",
    "training.dataset_path": "Folder, file or pattern of the data set's files",
    "training.global_batch_size": "Images in a step, over all ranks; more than the ranks hold at "
    "once are accumulated. -1: training.local_batch_size on every rank that reads data",
    "training.dtype": "Type of parameters; bfloat16 with stochastic rounding (AdamW, AdamW8bit)",
    "training.mixed_precision_param": "Type of computation. Where there is no GPU: float32, unless "
    "this key is set",
    "training.dataloader.num_workers": "Processes of each rank that read and decode images; 0 does "
    "it in a thread",
    "parallelism.data_parallel_replicate_degree": "Replicas of the model: DDP, and with sharding "
    "HSDP",
    "parallelism.data_parallel_shard_degree": "Ranks that a replica's parameters, gradients and "
    "optimizer are sharded over (FSDP); -1 takes the ranks that are left",
    "parallelism.fsdp_reshard_after_forward": "Whether gathered parameters are given up after the "
    "forward pass; default: where they are sharded or offloaded, except in a pipeline",
    "parallelism.pipeline_parallel_schedule": "GPipe, 1F1B, Interleaved1F1B or ZBVZeroBubble",
    "checkpoint.enable": "Save checkpoints, and continue from the newest one that is complete",
    "checkpoint.initial_load_path": "Checkpoint that a new run begins from",
    "checkpoint.initial_load_model_only": "Take weights alone from it; false continues its run, "
    "with optimizer, schedule and position in the data",
    "checkpoint.initial_load_in_hf": "checkpoint.initial_load_path is a diffusers folder or a "
    "safetensors file",
    "checkpoint.last_save_in_hf": "Write the last checkpoint as a diffusers folder",
    "checkpoint.export_dtype": "Type of weights in a last checkpoint that holds weights alone; "
    "where it cannot hold a value, they keep theirs, and the log names them",
    "checkpoint.keep_latest_k": "Keep so many checkpoints; 0 keeps all",
    "checkpoint.exclude_from_loading": "Parts of a checkpoint that begin anew, at every start: "
    "model, optimizer, lr_scheduler, dataloader",
    "compile.backend": "Backend of torch.compile",
    "comm.trace_buf_size": "Collectives that are recorded for a post-mortem; 0 where there is no "
    "GPU, unless this key is set",
    "validation.steps": "Batches over all ranks; -1 takes all held-out data",
    "debug.seed": "Seed of everything random; unset: drawn once, logged and kept in checkpoints",
}

MEANINGS = {
    **USED,
    **{key: f"Not used: {reason}" for key, reason in NOT_USED.items()},
    **{key: f"Not available: {reason}" for key, reason in NOT_AVAILABLE.items()},
}
"""Key -> meaning; these stand before what the fields themselves say."""
