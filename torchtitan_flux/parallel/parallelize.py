"""What is applied to the model, in which order. Read top to bottom."""

import functools
from collections.abc import Iterator, Sequence

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.encoders.text import T5Encoder
from torchtitan_flux.model import FluxModel
from torchtitan_flux.model.args import EMBEDDERS
from torchtitan_flux.model.initial_values import canonical_name, fill_initial_values, trainable
from torchtitan_flux.parallel.activation_checkpoint import (
    SavesByOperation,
    apply_activation_checkpoint,
)
from torchtitan_flux.parallel.context import apply_context_parallel
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.tensor import apply_tensor_parallel

OTHER_TRAINER = (
    "FLUX is trained by FluxTrainer: start with ./run_train.sh or "
    "`torchrun … -m torchtitan_flux.train`, not torchtitan.train"
)


GRAPHS_PER_BLOCK = 256
"""Sizes that a run may meet; torch's own limit of 8 would end a run that trains on ten."""


def parallelize_flux(
    model: FluxModel, parallel_dims: ParallelDims, job_config: FluxJobConfig
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

    # Tensor parallel takes the bare linears apart.
    if parallel_dims.tp_enabled:
        apply_tensor_parallel(model, parallel_dims.get_mesh("tp"))

    # Context parallel replaces attention, so it must be inside whatever wraps a block.
    if parallel_dims.cp_enabled:
        gather = hasattr(model, "final_layer")  # inner pipeline stages pass their tokens on
        apply_context_parallel(model, parallel_dims.get_mesh("cp"), gather)

    # Activation checkpointing, before compile: that knows which part of a wrapped block is a graph.
    ac = job_config.activation_checkpoint
    apply_activation_checkpoint(
        model,
        mode=ac.mode,
        selective_ac_option=ac.selective_ac_option,
        memory_budget=ac.memory_budget,
        offload_inputs=ac.offload_inputs,
        preserve_rng_state=ac.preserve_rng_state,
        early_stop=ac.early_stop,
        determinism_check=ac.determinism_check,
        debug=ac.debug,
    )

    if job_config.compiles("model"):
        compile_blocks(model, job_config.compile.backend)

    # What is not trained has no gradient: nothing is reduced or kept for it.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable(canonical_name(name), job_config.training.train_only))

    # Data parallel last: it owns the parameters.
    reshards = _reshards_after_forward(job_config, parallel_dims)
    shard_model(
        model,
        parallel_dims.data_mesh,
        param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
        reshard_after_forward=reshards,
        cpu_offload=job_config.training.enable_cpu_offload,
    )
    if not (reshards or parallel_dims.pp_enabled):  # a pipeline does it after all microbatches
        model.register_forward_hook(_reshard_unless_training)
    return model


def compile_blocks(model: FluxModel, backend: str) -> None:
    """Compile each block, in place; after activation checkpointing and before fully_shard.

    Two graphs serve all 57 layers of FLUX.1, made for each size, with the sizes as constants
    (docs/decisions.md). What cannot be one graph is an error, never silently slow. A checkpoint of
    a whole block goes around the compiled block; a choice among operations is a part of the graph.
    """
    torch._dynamo.config.recompile_limit = GRAPHS_PER_BLOCK
    for block in (*model.double_blocks.values(), *model.single_blocks.values()):
        if not isinstance(block, SavesByOperation):
            block = getattr(block, "_checkpoint_wrapped_module", block)
        block.compile(backend=backend, fullgraph=True, dynamic=False)


def _reshards_after_forward(config: FluxJobConfig, dims: FluxParallelDims) -> bool:
    """By default not in a pipeline, which would gather the weights again for each microbatch, and
    not where a rank has all of them: they would be cast again, to free memory that is free anyway
    by the time that the gradients need it. Where weights are offloaded memory is scarce.
    """
    policy = config.parallelism.fsdp_reshard_after_forward
    if policy != "default":
        return policy == "always"
    whole = dims.get_mesh("fsdp").size() == 1 and not config.training.enable_cpu_offload
    return not (dims.pp_enabled or whole)


def _reshard_unless_training(model: nn.Module, *_: object) -> None:
    if not torch.is_grad_enabled():  # no backward pass will do it
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Leave each rank its shards only: a state dict would find whole weights, soon out of date."""
    for module in _sharded(model):
        module.reshard()


def _sharded(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules that fully_shard was applied to."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def shard_model(
    model: FluxModel,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """One path for one rank, DDP, FSDP and HSDP: fully_shard on the (replicate, shard) mesh, or on
    the (shard) mesh where there is one replica.

    Gradients are summed, never averaged: the loss is already divided by the global count.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        cast_forward_inputs=False,  # True would take times, position ids and rope to bf16
    )
    shard = functools.partial(
        fully_shard, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward
    )
    if cpu_offload:
        shard = functools.partial(shard, offload_policy=CPUOffloadPolicy())
    embedders = [module for name, module in model.named_children() if name in EMBEDDERS]
    if embedders:  # only the first pipeline stage has them
        shard(embedders)
    for block in (*model.double_blocks.values(), *model.single_blocks.values()):
        shard(block)
    if hasattr(model, "final_layer"):  # only the last pipeline stage has it
        shard(model.final_layer)
    shard(model)
    for module in _sharded(model):
        if mesh.size() == 1:
            module.set_custom_reduce_scatter(NoCopyReduceScatter())  # type: ignore[arg-type]
        else:  # alone, even a factor of 1 would cost a pass over all gradients
            module.set_gradient_divide_factor(1.0)
            # the forced sum keeps gloo from being asked for PREMUL_SUM, which it lacks
            module.set_force_sum_reduction_for_comms(True)


class NoCopyReduceScatter:
    """FSDP2's reduction of gradients where there is nobody to reduce with.

    FSDP2 allocates a buffer to reduce from, then one to reduce into, and copies the one to the
    other. Given the same tensor twice it copies nothing.
    """

    def __init__(self) -> None:
        self._filled: Tensor | None = None

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        if self._filled is None:
            self._filled = torch.empty(*size, dtype=dtype, device=device)
            return self._filled
        given, self._filled = self._filled, None
        return given

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise AssertionError("a lone rank has nobody to reduce with")


def sync_gradients(model: nn.Module, last: bool) -> None:
    """Before a microbatch: data ranks share the gradients in the `last` one of a step only.

    Until then they are summed whole, and gathered weights stay.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last)
    model.set_is_last_backward(last)
    model.set_reshard_after_backward(last)


def shard_text_encoder(encoder: T5Encoder, mesh: DeviceMesh) -> None:
    """Spread the frozen T5 over the data ranks: 9.5 GB in bf16 at the XXL size, else on each.

    Its own dtype is its compute dtype, so that nothing is cast.
    """
    for block in encoder.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(encoder, mesh=mesh)
