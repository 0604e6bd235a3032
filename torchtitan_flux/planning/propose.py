"""Meshes that fit, by what they need and what they send."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.planning.dry_run import DryRun, dry_run
from torchtitan_flux.planning.estimate import (
    Estimate,
    estimate_of,
    resharded,
    sent_bytes,
)
from torchtitan_flux.planning.mesh import Mesh

CHECKPOINTING = ("none", "op", "full")
NODE = 8
"""Cards that tensor parallelism may join."""
USABLE = 0.95
"""Share of a card's memory that torch's allocator may take; the rest is the driver's."""


@dataclass(frozen=True)
class Proposal:
    """A mesh that fits; `sent` are bytes of a rank in a step."""

    mesh: Mesh
    checkpointing: str
    estimate: Estimate
    sent: int


def propose(
    config: FluxJobConfig, args: FluxModelArgs, ranks: int, memory: float, keep: int = 5
) -> list[Proposal]:
    """Meshes that fit, of each the least checkpointing that does; by memory, then bytes sent.

    Args:
        config: its degrees and checkpointing are not looked at; its local batch is kept.
        args: resolved model arguments.
        ranks: cards.
        memory: bytes of each.
        keep: how many to return.
    """
    runs: dict[tuple[str, int, Mesh], DryRun] = {}
    found: list[Proposal] = []
    microbatch = config.parallelism.pipeline_parallel_microbatch_size
    for mesh in meshes(args, ranks):
        if config.training.local_batch_size % microbatch and mesh.pp > 1:
            continue
        # replicas and shards follow from one run, whatever their numbers
        probe = replace(mesh, replicate=2, shard=2, pp=min(mesh.pp, 2))
        for mode in CHECKPOINTING:
            plan = with_checkpointing(config, mode)
            key = mode, min(2, mesh.microbatches(config.training)), probe
            if key not in runs:
                runs[key] = dry_run(plan, args, probe, key[1])
            run = resharded(runs[key], probe.fsdp / mesh.fsdp, args)
            estimate = estimate_of(run, plan, args, mesh)
            if estimate.reserved <= memory * USABLE:
                sent = sum(sent_bytes(run, plan, args, mesh).values())
                found.append(Proposal(mesh, mode, estimate, sent))
                break
    return sorted(found, key=lambda one: (one.estimate.reserved, one.sent))[:keep]


def with_checkpointing(config: FluxJobConfig, mode: str) -> FluxJobConfig:
    """A copy of the configuration with a mode: "op" is "selective" with that option."""
    config = copy.deepcopy(config)
    ac = config.activation_checkpoint
    ac.mode = "selective" if mode == "op" else mode  # type: ignore[assignment]
    ac.selective_ac_option, ac.offload_inputs = "op", False
    return config


def meshes(args: FluxModelArgs, ranks: int) -> Iterator[Mesh]:
    """Meshes of `ranks` ranks that the model can be split over, tensor groups within a node."""
    for pp in _divisors(ranks, min(8, args.depth + args.depth_single_blocks)):
        for tp in _divisors(ranks // pp, NODE):
            for cp in _divisors(ranks // pp // tp, args.num_heads):
                # the heads of a rank are shared out among its context group
                if args.num_heads % (tp * cp) == 0:
                    rest = ranks // pp // tp // cp
                    for shard in _divisors(rest, rest):
                        yield Mesh(rest // shard, shard, cp, tp, pp)


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]
