"""Memory of one rank, from a dry run and what stands beside the model."""

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torchtitan.config import TORCH_DTYPE_MAP, Parallelism

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.optimizers import OPTIMIZERS
from torchtitan_flux.parallel.pipeline_plan import pipeline_schedule
from torchtitan_flux.parallel.pipeline_split import split_model
from torchtitan_flux.planning.communication import Mesh
from torchtitan_flux.planning.dry_run import DryRun, dry_run
from torchtitan_flux.planning.frozen import Frozen, frozen_parts
from torchtitan_flux.planning.timeline import KINDS, Segment, Timeline, blocks_of

GIB = 2**30
FITTED_BATCHES = (1, 3)


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
        computed: of `step`, what is allocated on the stream that computes.
        beside: what FSDP's own streams hold, and lend to nobody: the gradients' shards, and for
            two blocks at once the gathered weights and the gradients to be reduced.
    """

    parameters: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    step: int
    update: int
    frozen: Frozen
    computed: int
    beside: int

    @property
    def standing(self) -> int:
        """Bytes that are there all the time."""
        return self.parameters + self.optimizer + self.averages + self.frozen.weights

    @property
    def phases(self) -> dict[str, int]:
        """Most bytes of each phase of a step, beyond what is there all the time."""
        return {
            "encoding": self.frozen.encoding,
            "forward and backward": self.step,
            "optimizer": self.update,
            "drawing": self.frozen.drawing,
        }

    @property
    def peak(self) -> int:
        return self.standing + max(self.phases.values())

    @property
    def reserved(self) -> int:
        """Bytes of a GPU that torch's allocator takes, from the second step on.

        It gives what one stream has freed to no other. Against the allocator itself on a stub
        driver: -1 to +5 %, without checkpointing +20 % (docs/parallelism.md); no card measured.
        """
        computed = max(self.computed, self.frozen.encoding, self.frozen.drawing)
        return self.standing + max(computed, self.update - self.gradients) + self.beside


def mesh_of(parallelism: Parallelism, ranks: int) -> Mesh:
    """Degrees of section [parallelism]; -1 for the shard degree takes what is left."""
    p = parallelism
    mesh = Mesh(
        p.data_parallel_replicate_degree,
        p.data_parallel_shard_degree,
        p.context_parallel_degree,
        p.tensor_parallel_degree,
        p.pipeline_parallel_degree,
    )
    return mesh if mesh.shard > 0 else replace(mesh, shard=max(1, ranks // -mesh.ranks))


def with_mesh(config: FluxJobConfig, mesh: Mesh) -> FluxJobConfig:
    """A copy of the configuration with these degrees."""
    config = copy.deepcopy(config)
    p = config.parallelism
    p.data_parallel_replicate_degree = mesh.replicate
    p.data_parallel_shard_degree = mesh.shard
    p.context_parallel_degree = mesh.cp
    p.tensor_parallel_degree = mesh.tp
    p.pipeline_parallel_degree = mesh.pp
    return config


def microbatches_of(config: FluxJobConfig, mesh: Mesh) -> int:
    """Microbatches whose gradients are summed before they are communicated."""
    t = config.training
    if t.global_batch_size < 1:
        return 1
    return max(1, t.global_batch_size // (t.local_batch_size * mesh.data))


def tokens_of(config: FluxJobConfig, args: FluxModelArgs) -> tuple[int, int]:
    """(image, text) tokens of a sample."""
    return args.geometry.grid(config.training.image_size).tokens, config.encoder.max_t5_encoding_len


def parameter_bytes(config: FluxJobConfig) -> int:
    """Bytes of a parameter, `training.dtype`."""
    return TORCH_DTYPE_MAP[config.training.dtype].itemsize


def optimizer_bytes(config: FluxJobConfig, count: int) -> int:
    """What the optimizer keeps beside so many parameters, nearly all of them in large matrices."""
    shape = (4096, 4096)
    kind, element = OPTIMIZERS[config.optimizer.name], parameter_bytes(config)
    return int(count * kind.state_bytes(shape, shape, element) / math.prod(shape))


def average_bytes(config: FluxJobConfig, count: int) -> int:
    """What averages of so many parameters take."""
    return 4 * len(config.ema.decay) * count


@functools.lru_cache
def parameters_of(args: FluxModelArgs) -> int:
    """Parameters of the model."""
    with torch.device("meta"):
        return sum(p.numel() for p in FluxModel(args).parameters())


def estimate(config: FluxJobConfig, args: FluxModelArgs, mesh: Mesh) -> tuple[Estimate, DryRun]:
    """By a dry run on this mesh; with pipeline stages, of the one that needs most.

    Args:
        config: job configuration; its degrees are not looked at.
        args: resolved model arguments.
        mesh: the degrees.
    """
    config = with_mesh(config, mesh)
    img, text = tokens_of(config, args)
    ac = config.activation_checkpoint
    by_number = ac.mode == "selective" and ac.selective_ac_option != "op"
    batch, summed = config.training.local_batch_size, microbatches_of(config, mesh)
    if mesh.pp > 1:
        batch, summed = config.parallelism.pipeline_parallel_microbatch_size, 1
    # two show what more of them do
    run = dry_run(config, args, batch, img, text, whole=by_number, microbatches=min(2, summed))
    return estimate_of(run.parameters, run.step, config, args, mesh), run


def estimate_of(
    parameters: dict[str, int],
    step: Timeline,
    config: FluxJobConfig,
    args: FluxModelArgs,
    mesh: Mesh,
) -> Estimate:
    """From what a whole model does on this mesh, its stages not yet told apart."""
    blocks, t = blocks_of(args), config.training
    shards = {kind: parameters[kind] // max(1, blocks[kind]) for kind in KINDS}
    if mesh.pp > 1:
        parameters, step = _bottleneck_stage(parameters, step, config, args, mesh)
    own = sum(parameters.values())
    dtypes = t.mixed_precision_param, t.mixed_precision_reduce
    sizes = sum(TORCH_DTYPE_MAP[dtype].itemsize for dtype in dtypes)
    count = own // parameter_bytes(config)
    largest = max(shards.values()) // parameter_bytes(config) * mesh.fsdp
    optimizer = config.optimizer
    # "foreach" computes the new values of all parameters before it stores them
    scratch = own if optimizer.implementation == "foreach" else 0
    return Estimate(
        parameters=own,
        gradients=own,
        optimizer=optimizer_bytes(config, count),
        averages=average_bytes(config, count),
        activations=step.activations,
        step=step.peak,
        update=own + scratch,
        frozen=_frozen(config, args, mesh.fsdp),
        computed=_without_shards(step, shards).peak,
        beside=own + 2 * largest * sizes,
    )


def _without_shards(step: Timeline, shards: dict[str, int]) -> Timeline:
    """A step in whose last backward pass each block leaves no shards of gradients behind."""
    segments = list(step.segments)
    for index in reversed(range(len(segments))):
        segment = segments[index]
        if segment.phase == "forward":
            break
        if segment.phase == "backward":
            kept = segment.kept - shards.get(segment.kind, 0)
            segments[index] = replace(segment, kept=kept)
    return Timeline(segments)


def _frozen(config: FluxJobConfig, args: FluxModelArgs, shard: int) -> Frozen:
    dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
    return frozen_parts(config, args, shard, dtype)


def _bottleneck_stage(
    parameters: dict[str, int],
    step: Timeline,
    config: FluxJobConfig,
    args: FluxModelArgs,
    mesh: Mesh,
) -> tuple[dict[str, int], Timeline]:
    """The pipeline rank that needs most: its blocks, and as many microbatches as it holds.

    1F1B and its kin hold as many microbatches as ranks come after this one, GPipe all of them.
    """
    split = split_model(
        config.parallelism, args, config.training.image_size, config.encoder.max_t5_encoding_len
    )
    schedule = pipeline_schedule(config.parallelism)
    t, p = config.training, config.parallelism
    count = t.local_batch_size // p.pipeline_parallel_microbatch_size
    found = []
    for rank in range(mesh.pp):
        names = [n for i in schedule.stages_of(rank, mesh.pp, len(split)) for n in split[i]]
        held = count if schedule.name == "GPipe" else min(count, mesh.pp - rank)
        if schedule.several:
            held = min(count, mesh.pp + held)
        blocks = {kind: sum(n.startswith(kind) for n in names) for kind in KINDS}
        totals = blocks_of(args)
        own = {kind: parameters[kind] * blocks[kind] // totals[kind] for kind in KINDS}
        own[""] = parameters[""] if rank in (0, mesh.pp - 1) else 0
        forward, backward = (_of_stage(step.segments, w, blocks) for w in ("forward", "backward"))
        # weights and gradients stay whole until the last microbatch is through
        whole = sum(own.values()) // parameter_bytes(config) * mesh.fsdp
        dtypes = t.mixed_precision_param, t.mixed_precision_reduce
        sizes = sum(TORCH_DTYPE_MAP[dtype].itemsize for dtype in dtypes)
        stays = Segment("weights", kept=whole * sizes if count > 1 else 0)
        others = Segment("forward", kept=(held - 1) * sum(s.kept for s in forward))
        timeline = Timeline([stays, others, *forward, *backward])
        found.append((sum(own.values()), own, timeline))
    need = [4 * total + timeline.peak for total, _, timeline in found]
    _, own, timeline = found[need.index(max(need))]
    return own, timeline


def _of_stage(segments: Sequence[Segment], phase: str, blocks: dict[str, int]) -> list[Segment]:
    """Typical segments of so many blocks; what embeds and what comes last is small beside them."""
    found: list[Segment] = []
    for kind in KINDS if phase == "forward" else reversed(KINDS):
        of_kind = [s for s in segments if s.phase == phase and s.kind == kind]
        if of_kind:
            found += [of_kind[len(of_kind) // 2]] * blocks[kind]
    return found


class Fitted:
    """Timelines for any batch and mesh from two dry runs, exact in the batch of each block.

    What a block keeps, and what it works with, grows with the tokens that a rank has; gathered
    weights do not; shards of gradients shrink with the ranks.

    Args:
        config: its activation checkpointing and precision are used.
        args: resolved model arguments.
        mesh: whose tensor degree it is, and whether sequences are cut.
    """

    def __init__(self, config: FluxJobConfig, args: FluxModelArgs, mesh: Mesh):
        self.config, self.args = config, args
        self._mesh = shown = Mesh(shard=4, cp=min(2, mesh.cp), tp=mesh.tp)
        img, text = tokens_of(config, args)
        plan = with_mesh(config, shown)
        self._runs = [dry_run(plan, args, batch, img, text) for batch in FITTED_BATCHES]

    def estimate(self, mesh: Mesh, batch: int) -> Estimate:
        """Estimate of a mesh of this kind."""
        few, many = self._runs
        config = with_mesh(self.config, mesh)
        config.training.local_batch_size = batch
        per = batch if mesh.pp == 1 else config.parallelism.pipeline_parallel_microbatch_size
        first, last = FITTED_BATCHES
        load = (per * self._mesh.cp / mesh.cp - first) / (last - first)
        blocks = blocks_of(self.args)
        share = self._mesh.fsdp / mesh.fsdp
        parameters = {k: int(v * share) for k, v in few.parameters.items()}
        segments = []
        for one, other in zip(few.step.segments, many.step.segments, strict=True):
            shift = 0
            if one.phase == "backward":
                kind = one.kind
                shift = (parameters[kind] - few.parameters[kind]) // max(1, blocks.get(kind, 2))
            kept = int(one.kept + load * (other.kept - one.kept)) + shift
            rise = int(one.rise + load * (other.rise - one.rise)) + max(0, shift)
            segments.append(replace(one, kept=kept, rise=rise))
        return estimate_of(parameters, Timeline(segments), config, self.args, mesh)
