"""Memory of one rank, from a dry run, optimizer states and frozen parts."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools import utils

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.optimizers import OPTIMIZERS
from torchtitan_flux.parallel.pipeline_plan import pipeline_schedule, split_model
from torchtitan_flux.planning.dry_run import (
    KINDS,
    DryRun,
    Mesh,
    blocks_of,
    dry_run,
    mesh_of,
    tokens_of,
    with_mesh,
)
from torchtitan_flux.planning.frozen import Frozen, frozen_parts
from torchtitan_flux.planning.tracker import Segment, Timeline, ring_bytes
from torchtitan_flux.startup.model_args import resolve_model_args
from torchtitan_flux.training.out_of_memory import training_remedies

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes on the rank that needs most.

    Attributes:
        parameters, gradients, optimizer: its shards.
        averages: its shards of them (`[ema]`), float32.
        activations: kept at the end of a forward pass.
        step: most that is alive at once between the beginning of the forward and the end of the
            backward pass: activations, gradients so far, gathered weights, what is worked with.
        update: most that the optimizer holds at once, gradients included.
        frozen: encoders and codec.
        compute_stream: of `step`, what is allocated on the stream that computes.
        comm_streams: what FSDP's own streams hold, and lend to nobody: the gradients' shards, and
            for two blocks at once the gathered weights and the gradients to be reduced.
    """

    parameters: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    step: int
    update: int
    frozen: Frozen
    compute_stream: int
    comm_streams: int

    @property
    def resident(self) -> int:
        """Bytes allocated through all phases."""
        return self.parameters + self.optimizer + self.averages + self.frozen.weights

    @property
    def phases(self) -> dict[str, int]:
        """Most bytes of each phase of a step, beyond what is resident."""
        return {
            "encoding": self.frozen.encoding,
            "forward and backward": self.step,
            "optimizer": self.update,
            "sampling": self.frozen.sampling,
        }

    @property
    def peak(self) -> int:
        return self.resident + max(self.phases.values())

    @property
    def reserved(self) -> int:
        """Bytes of a GPU that torch's allocator takes, from the second step on.

        It gives what one stream has freed to no other. Against the allocator itself on a stub
        driver: -1 to +5 %, without checkpointing +20 % (docs/parallelism.md); no card measured.
        """
        compute = max(self.compute_stream, self.frozen.encoding, self.frozen.sampling)
        return self.resident + max(compute, self.update - self.gradients) + self.comm_streams


def parameter_bytes(config: FluxJobConfig) -> int:
    """Bytes of a parameter, `training.dtype`."""
    return TORCH_DTYPE_MAP[config.training.dtype].itemsize


def state_bytes(config: FluxJobConfig, count: int) -> dict[str, int]:
    """Bytes of `count` parameters and their states; nearly all are in large matrices."""
    shape = (4096, 4096)
    kind, element = OPTIMIZERS[config.optimizer.name], parameter_bytes(config)
    return {
        "parameters": count * element,
        "optimizer": int(count * kind.state_bytes(shape, shape, element) / math.prod(shape)),
        "averages": 4 * len(config.ema.decay) * count,
    }


@functools.lru_cache
def parameters_of(args: FluxModelArgs) -> int:
    """Parameters of the model."""
    with torch.device("meta"):
        return sum(p.numel() for p in FluxModel(args).parameters())


def resharded(run: DryRun, factor: float, args: FluxModelArgs) -> DryRun:
    """The run with shards that are so much larger: of parameters and of gradients."""
    parameters = {kind: int(size * factor) for kind, size in run.parameters.items()}
    blocks = {"": 2, **blocks_of(args)}  # beside the blocks: two segments of a backward pass
    grown = {k: (parameters[k] - run.parameters[k]) // max(1, blocks[k]) for k in parameters}
    return DryRun(parameters, _shifted(run.step, grown, factor))


def sent_bytes(
    run: DryRun, config: FluxJobConfig, args: FluxModelArgs, mesh: Mesh
) -> dict[tuple[str, str], int]:
    """(kind of collective, dimension of the mesh) -> bytes that a rank sends in a step."""
    ranks = {"fsdp": mesh.fsdp, "replicate": mesh.replicate, "cp": mesh.cp, "tp": mesh.tp}
    ranks["cp+fsdp"] = mesh.fsdp
    found = {}
    messages = run.step.messages(mesh.microbatches(config.training))
    count = config.training.local_batch_size // config.parallelism.pipeline_parallel_microbatch_size
    for (kind, dimension), size in messages.items():
        if mesh.pp > 1:  # a stage: weights are gathered once, gradients reduced once
            gathered = kind == "all-gather" and dimension == "fsdp"
            size = size // mesh.pp // (2 if gathered else 1)
            size *= 1 if dimension in ("fsdp", "replicate") else count
        found[kind, dimension] = ring_bytes(kind, ranks[dimension], size)
    if mesh.pp > 1:  # hidden states and their gradients, between each two stages
        tokens = sum(-(-tokens // mesh.cp) for tokens in tokens_of(config, args))
        dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
        sample = tokens * args.hidden_size * dtype.itemsize
        found["send", "pp"] = 2 * config.training.local_batch_size * sample
    return {key: size for key, size in found.items() if size}


def estimate(config: FluxJobConfig, args: FluxModelArgs, mesh: Mesh) -> tuple[Estimate, DryRun]:
    """By a dry run on this mesh; with pipeline stages, of the one that needs most."""
    run = dry_run(config, args, mesh, mesh.microbatches(config.training))
    return estimate_of(run, config, args, mesh), run


def estimate_of(run: DryRun, config: FluxJobConfig, args: FluxModelArgs, mesh: Mesh) -> Estimate:
    """From what a whole model does on this mesh, before it is split into stages."""
    parameters, step, blocks = run.parameters, run.step, blocks_of(args)
    shards = {kind: parameters[kind] // max(1, blocks[kind]) for kind in KINDS}
    if mesh.pp > 1:
        parameters, step = _bottleneck_stage(run, with_mesh(config, mesh), args, mesh)
    own = sum(parameters.values())
    largest = max(shards.values()) // parameter_bytes(config) * mesh.fsdp
    return Estimate(
        **state_bytes(config, own // parameter_bytes(config)),
        gradients=own,
        activations=step.activations,
        step=step.peak,
        # "foreach" computes the new values of all parameters before it stores them
        update=own * (2 if config.optimizer.implementation == "foreach" else 1),
        frozen=frozen_parts(config, args, mesh.fsdp),
        compute_stream=_shifted(step, {kind: -size for kind, size in shards.items()}).peak,
        comm_streams=own + 2 * largest * _whole_bytes(config),
    )


def _whole_bytes(config: FluxJobConfig) -> int:
    """Bytes of a gathered weight and of its gradient before that is reduced."""
    t = config.training
    dtypes = t.mixed_precision_param, t.mixed_precision_reduce
    return sum(TORCH_DTYPE_MAP[dtype].itemsize for dtype in dtypes)


def _shifted(step: Timeline, more: dict[str, int], replicated: float = 1.0) -> Timeline:
    """The step with `more` bytes of gradients of each kind of block left by the last backward pass,
    and all-reduces over replicas scaled by `replicated`."""
    *before, last = step.microbatches
    segments = [segment for part in before for segment in part]
    for segment in last:
        shift = more.get(segment.kind, 0) if segment.phase == "backward" else 0
        messages = segment.messages.copy()
        if reduced := messages["all-reduce", "replicate"]:
            messages["all-reduce", "replicate"] = int(replicated * reduced)
        kept, rise = segment.kept + shift, segment.rise + max(0, shift)
        segments.append(replace(segment, kept=kept, rise=rise, messages=messages))
    return Timeline(segments)


def _bottleneck_stage(
    run: DryRun, config: FluxJobConfig, args: FluxModelArgs, mesh: Mesh
) -> tuple[dict[str, int], Timeline]:
    """The pipeline rank that needs most: its blocks, and as many microbatches as it holds.

    1F1B and its kin hold as many microbatches as ranks come after this one, GPipe all of them.
    """
    t, p, totals = config.training, config.parallelism, blocks_of(args)
    split = split_model(p, args)
    schedule = pipeline_schedule(p)
    count = t.local_batch_size // p.pipeline_parallel_microbatch_size
    found = []
    for rank in range(mesh.pp):
        names = [n for i in schedule.stages_of(rank, mesh.pp, len(split)) for n in split[i]]
        held = count if schedule.name == "GPipe" else min(count, mesh.pp - rank)
        if schedule.several:
            held = min(count, mesh.pp + held)
        blocks = {kind: sum(n.startswith(kind) for n in names) for kind in KINDS}
        own = {kind: run.parameters[kind] * blocks[kind] // totals[kind] for kind in KINDS}
        own[""] = run.parameters[""] if rank in (0, mesh.pp - 1) else 0
        total = sum(own.values())
        forward, backward = (_stage(run.step.segments, w, blocks) for w in ("forward", "backward"))
        # weights and gradients stay whole until the last microbatch is through
        whole = total // parameter_bytes(config) * mesh.fsdp * _whole_bytes(config)
        stays = Segment("weights", kept=whole if count > 1 else 0)
        others = Segment("forward", kept=(held - 1) * sum(s.kept for s in forward))
        timeline = Timeline([stays, others, *forward, *backward])
        found.append((4 * total + timeline.peak, own, timeline))
    _, own, timeline = max(found, key=lambda one: one[0])
    return own, timeline


def _stage(segments: Sequence[Segment], phase: str, blocks: dict[str, int]) -> list[Segment]:
    """Typical segments for these numbers of blocks; embedders and final layer are negligible."""
    found: list[Segment] = []
    for kind in KINDS if phase == "forward" else reversed(KINDS):
        of_kind = [s for s in segments if s.phase == phase and s.kind == kind]
        if of_kind:
            found += [of_kind[len(of_kind) // 2]] * blocks[kind]
    return found


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
    """Bytes that a rank holds at once at the very least, by what they are: shards of parameters,
    gradients and optimizer, and encoders. A plan adds activations."""
    args = resolve_model_args(config)
    t, mesh = config.training, mesh_of(config.parallelism, ranks)
    elements = parameters_of(args) // mesh.tp // mesh.pp
    count = 0 if t.enable_cpu_offload else elements // mesh.fsdp
    states = state_bytes(config, count)
    whole = 0
    if mesh.microbatches(t) > 1 and mesh.fsdp > 1:
        # FSDP2 sums gradients that it does not communicate yet in whole tensors
        whole = elements * TORCH_DTYPE_MAP[t.mixed_precision_reduce].itemsize
    return {
        **states,
        "gradients of microbatches": whole,
        "gradients": states["parameters"],
        "encoders": frozen_parts(config, args, mesh.fsdp, work=False).weights,
    }
