"""Meshes that fit, by what they need and what they send."""

from collections.abc import Iterator
from dataclasses import dataclass

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.config import TORCH_DTYPE_MAP

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.planning.communication import Mesh, Message, messages
from torchtitan_flux.planning.estimate import (
    Estimate,
    Fitted,
    microbatches_of,
    parameters_of,
    tokens_of,
    with_mesh,
)

CHECKPOINTING = ("none", "op", "full")
NODE = 8
"""Cards that tensor parallelism may join."""
USABLE = 0.95
"""Share of a card's memory that torch's allocator may take; the rest is the driver's."""


@dataclass(frozen=True)
class Proposal:
    """A mesh that fits."""

    mesh: Mesh
    checkpointing: str
    estimate: Estimate
    sent: int
    """Bytes that a rank sends in a step."""


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
    fitted: dict[tuple[str, int, bool], Fitted] = {}
    found: list[Proposal] = []
    batch = config.training.local_batch_size
    for mesh in meshes(args, ranks):
        if batch % config.parallelism.pipeline_parallel_microbatch_size and mesh.pp > 1:
            continue
        for mode in CHECKPOINTING:
            plan = with_checkpointing(with_mesh(config, mesh), mode)
            kind = mode, mesh.tp, mesh.cp > 1
            if kind not in fitted:
                fitted[kind] = Fitted(plan, args, mesh)
            estimate = fitted[kind].estimate(mesh, batch)
            if estimate.reserved <= memory * USABLE:
                own = parameters_of(args) // (mesh.tp * mesh.pp)
                sent = sum(m.sent for m in step_messages(plan, args, mesh, own))
                found.append(Proposal(mesh, mode, estimate, sent))
                break
    return sorted(found, key=lambda one: (one.estimate.reserved, one.sent))[:keep]


def with_checkpointing(config: FluxJobConfig, mode: str) -> FluxJobConfig:
    """The configuration, changed: "op" is mode "selective" with that option."""
    ac = config.activation_checkpoint
    ac.mode = "selective" if mode == "op" else mode  # type: ignore[assignment]
    ac.selective_ac_option, ac.offload_inputs = "op", False
    return config


def meshes(args: FluxModelArgs, ranks: int) -> Iterator[Mesh]:
    """Meshes of so many ranks that the model can be cut by, tensor groups within a node."""
    blocks = args.depth + args.depth_single_blocks
    for pp in _divisors(ranks):
        if pp > min(8, blocks):
            continue
        for tp in _divisors(ranks // pp):
            if tp > NODE or args.num_heads % tp:
                continue
            for cp in _divisors(ranks // pp // tp):
                # the heads of a rank are shared out among its context group
                if (args.num_heads // tp) % cp:
                    continue
                rest = ranks // pp // tp // cp
                for shard in _divisors(rest):
                    yield Mesh(rest // shard, shard, cp, tp, pp)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def step_messages(
    config: FluxJobConfig, args: FluxModelArgs, mesh: Mesh, own: int
) -> list[Message]:
    """What a rank of this plan sends in a step.

    Args:
        config: with the plan's batch and checkpointing.
        args: resolved model arguments.
        mesh: the degrees.
        own: parameters of a rank and those that share them, before they are sharded.
    """
    t, ac = config.training, config.activation_checkpoint
    img, text = tokens_of(config, args)
    return messages(
        args,
        mesh,
        parameters=own,
        batch=t.local_batch_size,
        img_tokens=img,
        text_tokens=text,
        recomputed=float(ac.mode == "full"),
        microbatches=microbatches_of(config, mesh),
        compute_bytes=TORCH_DTYPE_MAP[t.mixed_precision_param].itemsize,
        reduce_bytes=TORCH_DTYPE_MAP[t.mixed_precision_reduce].itemsize,
        reshard=config.parallelism.fsdp_reshard_after_forward != "never" and mesh.pp == 1,
    )
