"""Pipeline parallelism: its schedules, where a model is cut into stages, and what does not fit."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.config import Parallelism

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import Problem
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.model.args import EMBEDDERS

PREFIX = "parallelism.pipeline_parallel_"


@dataclass(frozen=True)
class Schedule:
    """A schedule of torch.distributed.pipelining.

    Attributes:
        name: how torch calls it.
        several: whether a rank has two stages.
        v_shaped: whether its two stages lie as a V: the first rank has the first and the last.
            Gradients of weights then wait until a rank has nothing else to do.
        fills: whether torch wants as many microbatches as there are stages.
        evaluation: the schedule that runs the same stages forward only.
    """

    name: str
    several: bool = False
    v_shaped: bool = False
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
        Schedule("ZBVZeroBubble", several=True, v_shaped=True, evaluation="ZBVZeroBubble"),
    )
}


def pipeline_schedule(parallelism: Parallelism) -> Schedule:
    """The configured schedule."""
    return SCHEDULES[parallelism.pipeline_parallel_schedule.lower()]


def split_model(parallelism: Parallelism, args: FluxModelArgs) -> list[list[str]]:
    """Names of the modules of each stage: equally many blocks, the first stages one less where they
    do not divide, since the first embeds. A double block has twice the weights of a single one and
    costs the same: a token meets one half of them.
    """
    embedders = [name for name in EMBEDDERS if args.guidance_embed or name != "guidance_in"]
    blocks = [f"double_blocks.{i}" for i in range(args.depth)]
    blocks += [f"single_blocks.{i}" for i in range(args.depth_single_blocks)]
    stages, count = _stage_count(parallelism), len(blocks)
    ends = [count * stage // stages for stage in range(stages + 1)]
    split = [blocks[begin:end] for begin, end in pairwise(ends)]
    return [[*embedders, *split[0]], *split[1:-1], [*split[-1], "final_layer"]]


def _stage_count(parallelism: Parallelism) -> int:
    """Over all ranks."""
    several = pipeline_schedule(parallelism).several
    return parallelism.pipeline_parallel_degree * (2 if several else 1)


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
        if pipeline_schedule(p).v_shaped:
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
    too_few = schedule.fills and count < ranks
    if too_few or (schedule.in_rounds and count % max(1, count // ranks)):
        yield Problem(
            key,
            f"makes {count} microbatches of training.local_batch_size = {batch}; {PREFIX}schedule "
            f"= {schedule.name!r} needs a multiple of {PREFIX}degree = {ranks}",
            related,
        )


def _split_backward_problems(config: FluxJobConfig) -> Iterator[Problem]:
    """The backward pass of a stage is done in two parts, on a graph that is kept in between."""
    ac, key = config.activation_checkpoint, "parallelism.fsdp_reshard_after_forward"
    by_operation = ac.mode == "selective" and ac.selective_ac_option == "op"
    for conflicts, related, remedy in (
        (config.compiles("model"), "compile.enable", "false"),
        (by_operation, "activation_checkpoint.mode", '"full"'),
        (config.parallelism.fsdp_reshard_after_forward == "always", key, '"default"'),
    ):
        if conflicts:
            message = f"comes back to a stage's weights and graph; set {related} = {remedy}"
            yield Problem(f"{PREFIX}schedule", f"{message}, or use 'Interleaved1F1B'", (related,))


def pipeline_fit(config: FluxJobConfig, args: FluxModelArgs) -> Iterator[Problem]:
    """Stages that this model cannot be cut into."""
    p, blocks = config.parallelism, args.depth + args.depth_single_blocks
    if p.pipeline_parallel_degree < 2 or p.pipeline_parallel_schedule.lower() not in SCHEDULES:
        return
    if (stages := _stage_count(p)) > blocks:
        makes = f"makes {stages} stages of {blocks} blocks"
        yield Problem(f"{PREFIX}degree", f"{makes}; each needs one", (f"{PREFIX}schedule",))
