"""Whether a run can fit at all: a bound from below, in a second, before anything is built.

Only what cannot be avoided is counted: shards of parameters, gradients and optimizer, encoders, and
what blocks keep between forward and backward pass. What a plan adds (planning/estimate.py) depends
on the allocator's luck; a run is refused when not even this fits.
"""

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools import utils

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.parallel.activation_checkpoint import apply_activation_checkpoint
from torchtitan_flux.planning.dry_run import (
    blocks_of,
    mark_blocks,
    model_inputs,
    probe_args,
)
from torchtitan_flux.planning.estimate import (
    GIB,
    parameters_of,
    state_bytes,
)
from torchtitan_flux.planning.frozen import frozen_parts
from torchtitan_flux.planning.mesh import mesh_of
from torchtitan_flux.planning.tracker import MemoryTracker, Timeline
from torchtitan_flux.startup.model_args import resolve_model_args
from torchtitan_flux.training.out_of_memory import training_remedies


def fits(config: FluxJobConfig, ranks: int, ranks_per_machine: int, device: int = 0) -> str | None:
    """Why the configured run cannot fit this machine, with the keys to change; None if it may.

    Args:
        config: a checked configuration.
        ranks: of the whole run.
        ranks_per_machine: how many share this machine, and its memory where there is no GPU.
        device: number of the GPU that is looked at.
    """
    memory = utils.device_module.get_device_properties(device).total_memory
    if utils.device_type == "cpu":
        memory //= ranks_per_machine
    need = lower_bound(config, ranks)
    if sum(need.values()) <= memory:
        return None
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in need.items() if size)
    return (
        f"the run needs at least {sum(need.values()) / GIB:.1f} GiB on each rank ({parts}); there "
        f"are {memory / GIB:.1f}. What helps: {'; '.join(training_remedies(config))}"
    )


def lower_bound(config: FluxJobConfig, ranks: int) -> dict[str, int]:
    """Bytes that a rank holds at once at the very least, by what they are."""
    args = resolve_model_args(config)
    t, mesh = config.training, mesh_of(config.parallelism, ranks)
    elements = parameters_of(args) // mesh.tp // mesh.pp
    count = 0 if t.enable_cpu_offload else elements // mesh.fsdp
    states = state_bytes(config, count)
    own = states["parameters"]
    kept = activations_of(config, args) // (mesh.cp * mesh.tp * mesh.pp)
    whole = 0
    if mesh.microbatches(t) > 1 and mesh.fsdp > 1:
        # FSDP2 sums gradients that it does not communicate yet in whole tensors
        whole = elements * TORCH_DTYPE_MAP[t.mixed_precision_reduce].itemsize
    return {
        **states,
        "gradients of microbatches": whole,
        # the one shrinks while the other grows
        "activations" if kept > own else "gradients": max(kept, own),
        "encoders": frozen_parts(config, args, mesh.fsdp, work=False).weights,
    }


def activations_of(config: FluxJobConfig, args: FluxModelArgs) -> int:
    """Bytes that all blocks keep for a microbatch of one rank, before they are shared out."""
    ac, p = config.activation_checkpoint, config.parallelism
    mode, option = ac.mode, ac.selective_ac_option
    if ac.offload_inputs:
        return 0
    if mode == "memory_budget":
        mode = "full"
    elif config.compile.enable and mode == "none":
        mode, option = "selective", "op"  # a compiled block keeps no more
    by_number = mode == "selective" and option != "op"
    dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
    with torch.device("meta"):
        model = FluxModel(args if by_number else probe_args(args))
    apply_activation_checkpoint(model, mode, option)
    pipeline = p.pipeline_parallel_degree > 1
    batch = p.pipeline_parallel_microbatch_size if pipeline else config.training.local_batch_size
    tracker = MemoryTracker()
    with FakeTensorMode(), tracker:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
        inputs = model_inputs(config, args, batch, dtype)
        mark_blocks(model, tracker)
        tracker.mark("forward")
        velocity = model(*inputs)
        tracker.mark("end")
        del velocity
    return Timeline(tracker.segments[1:]).repeated(blocks_of(args)).activations
