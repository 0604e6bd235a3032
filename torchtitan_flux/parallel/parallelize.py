"""What is applied to the model, in which order. Read top to bottom."""

import functools

import torchtitan_flux.engine  # noqa: F401  (before torchtitan)

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims

from torchtitan_flux.encoders.text import T5Encoder
from torchtitan_flux.model import FluxModel
from torchtitan_flux.parallel.activation_checkpoint import apply_activation_checkpoint
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.initial_values import fill_initial_values

OTHER_TRAINER = (
    "FLUX is trained by FluxTrainer: start with ./run_train.sh or "
    "`torchrun … -m torchtitan_flux.training.trainer`, not torchtitan.train"
)


def parallelize_flux(
    model: FluxModel, parallel_dims: ParallelDims, job_config: JobConfig
) -> FluxModel:
    """Apply the configured parallelism to a model on the meta device, in place.

    Raises:
        RuntimeError: when the trainer is not ours, which keeps the data mesh on any world size.
    """
    if not isinstance(parallel_dims, FluxParallelDims):
        raise RuntimeError(OTHER_TRAINER)
    # Initial values first: they are named by the bare model.
    seed = job_config.debug.seed
    assert seed is not None, "FluxTrainer resolves debug.seed before it builds the model"
    model.init_weights = functools.partial(fill_initial_values, model, seed)  # type: ignore

    # Activation checkpointing goes around blocks, inside of compile and FSDP.
    ac = job_config.activation_checkpoint
    apply_activation_checkpoint(model, ac.mode, ac.preserve_rng_state)

    # Compile each block: two graphs serve 57 layers.
    if job_config.compile.enable and "model" in job_config.compile.components:
        for blocks in (model.double_blocks, model.single_blocks):
            for block in blocks.values():
                block.compile(backend=job_config.compile.backend, fullgraph=True)

    # Data parallel last: it owns the parameters.
    shard_model(
        model,
        parallel_dims.data_mesh,
        param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
        reshard_after_forward=job_config.parallelism.fsdp_reshard_after_forward != "never",
        cpu_offload=job_config.training.enable_cpu_offload,
    )
    return model


def shard_model(
    model: FluxModel,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """One path for one rank, DDP, FSDP and HSDP: fully_shard on the (replicate, shard) mesh.

    Gradients are summed, never averaged: the loss is already divided by the global count.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        cast_forward_inputs=False,  # True would take times, position ids and rope to bf16
    )
    options = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": reshard_after_forward}
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    embedders = [
        module
        for name, module in model.named_children()
        if name.endswith("_in")  # img_in, txt_in, time_in, vector_in, guidance_in
    ]
    fully_shard(embedders, **options)  # type: ignore[arg-type]
    for blocks in (model.double_blocks, model.single_blocks):
        for block in blocks.values():
            fully_shard(block, **options)  # type: ignore[arg-type]
    fully_shard(model.final_layer, **options)  # type: ignore[arg-type]
    fully_shard(model, **options)  # type: ignore[arg-type]
    sum_gradients(model)


def sum_gradients(model: nn.Module) -> None:
    """Make gradient reduction a plain sum.

    The forced sum keeps gloo from being asked for PREMUL_SUM, which it lacks; at factor 1 it adds
    no operation anywhere.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def shard_text_encoder(encoder: T5Encoder, mesh: DeviceMesh) -> None:
    """Spread the frozen T5 over the data ranks: 9.5 GB in bf16 at the XXL size, else on each.

    Its own dtype is its compute dtype, so that nothing is cast.
    """
    for block in encoder.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(encoder, mesh=mesh)
