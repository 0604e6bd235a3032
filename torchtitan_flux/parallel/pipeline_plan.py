"""Pipeline parallelism: its schedules, how many stages they make, and what does not fit."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.config import Parallelism

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import ConfigError, Problem, violated
from torchtitan_flux.model import FluxModelArgs

SECTION = "parallelism."
PREFIX = SECTION + "pipeline_parallel_"


@dataclass(frozen=True)
class Schedule:
    """A schedule of torch.distributed.pipelining.

    Attributes:
        name: how torch calls it.
        several: whether a rank has several stages.
        v_shaped: whether its two stages lie as a V: the first rank has the first and the last.
        splits_backward: whether gradients of weights wait until a rank has nothing else to do.
        fills: whether torch wants as many microbatches as there are stages.
        evaluation: the schedule that runs the same stages forward only.
    """

    name: str
    several: bool = False
    v_shaped: bool = False
    splits_backward: bool = False
    fills: bool = False
    evaluation: str = "GPipe"

    @property
    def in_rounds(self) -> bool:
        """Whether microbatches beyond the number of ranks must be a multiple of it."""
        return self.several and not self.v_shaped

    def stages_of(self, rank: int, ranks: int, stages: int) -> list[int]:
        """Which of the stages a rank has, in ascending order."""
        if self.v_shaped:
            return [rank, stages - 1 - rank]
        return list(range(rank, stages, ranks))


SCHEDULES = {
    schedule.name.lower(): schedule  # torch does not look at the case either
    for schedule in (
        Schedule("GPipe"),
        Schedule("1F1B", fills=True),
        Schedule("Interleaved1F1B", several=True, evaluation="Interleaved1F1B"),
        Schedule(
            "InterleavedZeroBubble",
            several=True,
            splits_backward=True,
            evaluation="Interleaved1F1B",
        ),
        Schedule(
            "ZBVZeroBubble",
            several=True,
            v_shaped=True,
            splits_backward=True,
            evaluation="ZBVZeroBubble",
        ),
    )
}


def pipeline_schedule(parallelism: Parallelism) -> Schedule:
    """The configured schedule."""
    return SCHEDULES[parallelism.pipeline_parallel_schedule.lower()]


def stage_count(parallelism: Parallelism, args: FluxModelArgs) -> int:
    """Stages over all ranks: of the named parts, of so many blocks each, or the fewest there are.

    Raises:
        ConfigError: the key that gives the ranks a number of stages which the schedule does not
            take.
    """
    ranks = parallelism.pipeline_parallel_degree
    schedule = pipeline_schedule(parallelism)
    blocks = args.depth + args.depth_single_blocks
    parts = parallelism.module_fqns_per_model_part
    per_stage = parallelism.pipeline_parallel_layers_per_stage
    stages, key = ranks * (2 if schedule.several else 1), f"{PREFIX}degree"
    if parts:
        stages, key = len(parts), f"{SECTION}module_fqns_per_model_part"
    elif per_stage is not None:
        key = f"{PREFIX}layers_per_stage"
        stages = math.ceil(blocks / per_stage) if per_stage > 0 else 0
    per_rank = stages // ranks
    wanted = "two" if schedule.v_shaped else "two or more" if schedule.several else "one"
    fits = per_rank == 2 if schedule.v_shaped else (per_rank > 1) == schedule.several
    makes = f"makes {stages} stages of {blocks} blocks; {PREFIX}schedule = {schedule.name!r} needs"
    misfit = stages % ranks or not per_rank or not fits
    rules = violated(
        (misfit, key, f"{makes} {wanted} for each of the {ranks} ranks of {PREFIX}degree"),
        (not misfit and stages > blocks, key, f"{makes} a block for each: choose fewer stages"),
    )
    if problems := list(rules):
        raise ConfigError(problems)
    return stages


def module_names(args: FluxModelArgs) -> list[str]:
    """The model's modules that a stage can hold, in the order in which they run."""
    return [
        "img_in",
        "txt_in",
        "time_in",
        "vector_in",
        *(["guidance_in"] if args.guidance_embed else []),
        *(f"double_blocks.{i}" for i in range(args.depth)),
        *(f"single_blocks.{i}" for i in range(args.depth_single_blocks)),
        "final_layer",
    ]


def check_parts(parts: list[list[str]], args: FluxModelArgs) -> None:
    """Whether named parts are the whole model, in order, each with a block.

    Raises:
        ConfigError: naming the module that is unknown, missing or out of place.
    """
    if problem := _parts_problem(parts, args):
        raise ConfigError([Problem(f"{SECTION}module_fqns_per_model_part", problem)])


def _parts_problem(parts: list[list[str]], args: FluxModelArgs) -> str:
    known = module_names(args)
    named = [name for part in parts for name in part]
    for what, names in (
        ("does not know", [name for name in named if name not in known]),
        ("misses", [name for name in known if name not in named]),
        ("names twice", sorted({name for name in named if named.count(name) > 1})),
    ):
        if names:
            return f"{what} {', '.join(names)}; the modules are {', '.join(known)}"
    # embedders may be named in any order: they run side by side
    embedders = [name for name in known if name.endswith("_in")]
    if outside := [name for name in embedders if name not in parts[0]]:
        return f"{', '.join(outside)} must be in the first part"
    blocks = [name for name in named if name not in embedders]
    for name, expected in zip(blocks, (n for n in known if n not in embedders), strict=True):
        if name != expected:
            return f"is out of order: {name} stands where {expected} runs"
    for number, part in enumerate(parts):
        if not any("_blocks." in name for name in part):
            return f"part {number} has no block"
    return ""


def pipeline_problems(config: FluxJobConfig) -> Iterator[Problem]:
    """What is wrong with the keys of pipeline parallelism, whatever the model."""
    p = config.parallelism
    if p.pipeline_parallel_degree < 2:
        return
    if p.pipeline_parallel_schedule.lower() not in SCHEDULES:
        known = ", ".join(schedule.name for schedule in SCHEDULES.values())
        yield Problem(f"{PREFIX}schedule", f"is not available; use one of {known}")
    else:
        yield from _microbatch_problems(config)
        if pipeline_schedule(p).splits_backward:
            yield from _split_backward_problems(config)


def _microbatch_problems(config: FluxJobConfig) -> Iterator[Problem]:
    schedule, batch = pipeline_schedule(config.parallelism), config.training.local_batch_size
    ranks = config.parallelism.pipeline_parallel_degree
    size = config.parallelism.pipeline_parallel_microbatch_size
    key = f"{PREFIX}microbatch_size"
    related = ("training.local_batch_size", f"{PREFIX}degree", f"{PREFIX}schedule")
    if size < 1 or batch % size:
        yield Problem(key, f"does not divide training.local_batch_size = {batch}", related)
        return
    count = batch // size
    rounds = max(1, count // ranks)
    makes = (
        f"makes {count} microbatches of training.local_batch_size = {batch}; {PREFIX}schedule = "
        f"{schedule.name!r} needs"
    )
    yield from violated(
        (
            schedule.fills and count < ranks,
            key,
            f"{makes} {ranks} or more, one for each rank: raise the batch, lower the microbatch, "
            "or use 'GPipe'",
            *related,
        ),
        (
            schedule.in_rounds and count % rounds,
            key,
            f"{makes} a multiple of {rounds}: make it a multiple of {PREFIX}degree = {ranks}",
            *related,
        ),
    )


def _split_backward_problems(config: FluxJobConfig) -> Iterator[Problem]:
    """The backward pass of a stage is done in two parts, on a graph that is kept in between."""
    key, ac = f"{PREFIX}schedule", config.activation_checkpoint
    yield from violated(
        (
            config.compiles("model"),
            key,
            "takes the backward pass of blocks apart, which compiled blocks do not allow; set "
            "compile.enable = false, or use 'Interleaved1F1B'",
            "compile.enable",
        ),
        (
            ac.mode == "selective" and ac.selective_ac_option == "op",
            key,
            "comes back to a block's graph for the weights, and what "
            'activation_checkpoint.selective_ac_option = "op" kept is gone by then; set it to a '
            "number in quotes, activation_checkpoint.mode = \"full\", or use 'Interleaved1F1B'",
            "activation_checkpoint.mode",
        ),
        (
            config.parallelism.fsdp_reshard_after_forward == "always",
            key,
            "needs a stage's weights from its forward to the end of its backward pass; set "
            'parallelism.fsdp_reshard_after_forward = "default"',
            "parallelism.fsdp_reshard_after_forward",
        ),
    )


def pipeline_fit(config: FluxJobConfig, args: FluxModelArgs) -> list[Problem]:
    """Stages that this model cannot be cut into."""
    p = config.parallelism
    if p.pipeline_parallel_degree < 2 or p.pipeline_parallel_schedule.lower() not in SCHEDULES:
        return []
    try:
        stage_count(p, args)
        if p.module_fqns_per_model_part:
            check_parts(p.module_fqns_per_model_part, args)
    except ConfigError as error:
        return error.problems
    return []
