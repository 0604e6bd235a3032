"""Meshes that fit, best first.

The time of a step is put together from three things, for a rank:

- operations of forward and backward, more for what is run again, at a share of the card's peak,
  and slower where a product has few tokens;
- messages that the rank waits for: of tensor and context parallelism, and between stages;
- messages that go on beside: gathered weights and reduced gradients, as far as they take longer
  than the operations.

With pipeline stages all of it is stretched by the bubble. Groups of ranks that lie on one node talk
at its speed, others at the network's. The speeds only rank the proposals; they are not measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.config import TORCH_DTYPE_MAP

from torchtitan_flux.model import FluxModelArgs, flops_per_image
from torchtitan_flux.planning.communication import Mesh, Message, messages
from torchtitan_flux.planning.estimate import (
    GIB,
    PARAMETER_BYTES,
    STATES,
    Estimate,
    Fitted,
    microbatches_of,
    parameters_of,
    tokens_of,
    with_mesh,
)

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
MOST = 8
"""Images of a step for each rank, where training.global_batch_size says nothing."""
CHECKPOINTING = ("none", "op", "full")
AGAIN = {"none": 0.0, "op": 0.03, "full": 1 / 3}
"""Operations that are done again, as a share of forward and backward. Norms and activations, which
"op" runs again, take time by memory traffic."""


@dataclass(frozen=True)
class Machine:
    """Speeds that proposals are ranked by.

    Attributes:
        flops: operations a second that a card reaches in matrix products.
        node: cards that are joined by fast links.
        inside, outside: bytes a second that a card sends to its node, and to others.
        few: tokens in a matrix product for which reading the weights takes as long as multiplying
            (an H100: 989 TFLOP/s over 3.35 TB/s).
        free: share of the card's memory that torch's allocator may take; the rest is for the
            driver and the buffers of collectives.
    """

    flops: float = 400e12
    node: int = 8
    inside: float = 300e9
    outside: float = 40e9
    few: int = 295
    free: float = 0.95

    def speed(self, dimension: str, mesh: Mesh) -> float:
        """Bytes a second within a group; ranks lie in the order pp, replicate, shard, cp, tp."""
        reach = {"tp": mesh.tp, "cp": mesh.cp * mesh.tp, "fsdp": mesh.fsdp * mesh.tp}
        ranks = reach.get(dimension, mesh.ranks)
        return self.inside if ranks <= self.node else self.outside


@dataclass(frozen=True)
class Cost:
    """Seconds of a step on a rank.

    Attributes:
        compute: operations, with those done again.
        again: of those, what is done again.
        small: of those, what products of few tokens take longer.
        waited: messages that the rank waits for.
        exposed: messages beside, as far as they take longer than the operations.
        bubble: share of the step that a rank waits for other stages.
        images: of the step, for each rank.
    """

    compute: float
    again: float
    small: float
    waited: float
    exposed: float
    bubble: float
    images: float

    @property
    def seconds(self) -> float:
        return (self.compute + self.waited + self.exposed) / (1 - self.bubble)

    @property
    def per_image(self) -> float:
        """Seconds of a card for each image."""
        return self.seconds / self.images


@dataclass(frozen=True)
class Proposal:
    """A mesh that fits, and why it stands where it does."""

    mesh: Mesh
    checkpointing: str
    batch: int
    estimate: Estimate
    cost: Cost

    @property
    def reason(self) -> str:
        """What the time of a step goes to."""
        cost = self.cost
        whole = cost.seconds
        parts = [f"{(cost.compute - cost.again - cost.small) / whole:.0%} useful operations"]
        for name, seconds in (
            ("run again", cost.again),
            ("reading weights for few tokens", cost.small),
            ("waiting for messages", cost.waited),
            ("weights and gradients not hidden", cost.exposed),
            ("bubble", cost.bubble * whole),
        ):
            if seconds / whole >= 0.005:
                parts.append(f"{seconds / whole:.0%} {name}")
        return ", ".join(parts)


def propose(
    config: Any,
    args: FluxModelArgs,
    ranks: int,
    memory: float,
    machine: Machine | None = None,
    keep: int = 5,
) -> list[Proposal]:
    """The best meshes that fit; of each mesh only its best batch and checkpointing.

    Args:
        config: job configuration; its degrees, local batch and checkpointing are not looked at.
            With training.global_batch_size set, a step has as many images, in one microbatch.
        args: resolved model arguments.
        ranks: cards.
        memory: bytes of each.
        machine: speeds.
        keep: how many to return.
    """
    machine = machine or Machine()
    fitted: dict[tuple[str, int, bool], Fitted] = {}
    found: dict[Mesh, Proposal] = {}
    too_much: dict[tuple[Mesh, str], int] = {}
    for candidate in sorted(_candidates(config, args, ranks, machine), key=_order):
        mesh, mode, batch = candidate.mesh, candidate.checkpointing, candidate.batch
        if mesh in found or batch >= too_much.get((mesh, mode), batch + 1):
            continue
        if _states(config, args, mesh) > memory * machine.free:
            continue
        plan = with_checkpointing(with_mesh(config, mesh), mode)
        plan.training.local_batch_size = batch
        kind = mode, mesh.tp, mesh.cp > 1
        if kind not in fitted:
            fitted[kind] = Fitted(plan, args, mesh)
        estimate = fitted[kind].estimate(mesh, batch)
        if estimate.reserved > memory * machine.free:
            too_much[mesh, mode] = batch
            continue
        found[mesh] = Proposal(mesh, mode, batch, estimate, candidate.cost)
        if len(found) == keep:
            break
    return list(found.values())


def _states(config: Any, args: FluxModelArgs, mesh: Mesh) -> int:
    """Bytes of a rank's parameters, gradients and optimizer: known without a dry run."""
    own = parameters_of(args) // (mesh.tp * mesh.pp * mesh.fsdp)
    return (2 + STATES[config.optimizer.name]) * PARAMETER_BYTES * own


@dataclass(frozen=True)
class _Candidate:
    mesh: Mesh
    checkpointing: str
    batch: int
    cost: Cost


def _order(candidate: _Candidate) -> tuple[float, int, int]:
    """Quicker first; where that is a matter of 1 %, the simpler mesh, then the smaller batch."""
    mesh = candidate.mesh
    used = sum(degree > 1 for degree in (mesh.replicate, mesh.shard, mesh.cp, mesh.tp, mesh.pp))
    return float(f"{candidate.cost.per_image:.1e}"), used, candidate.batch


def _candidates(
    config: Any, args: FluxModelArgs, ranks: int, machine: Machine
) -> Iterator[_Candidate]:
    """All plans, whether they fit or not."""
    elements = parameters_of(args)
    for mesh in meshes(args, ranks, machine.node):
        plan = with_mesh(config, mesh)
        own = elements // (mesh.tp * mesh.pp)
        for mode in CHECKPOINTING:
            with_checkpointing(plan, mode)
            for batch in batches(plan, mesh):
                plan.training.local_batch_size = batch
                yield _Candidate(mesh, mode, batch, cost(plan, args, mesh, own, machine))


def with_checkpointing(config: Any, mode: str) -> Any:
    """The configuration, changed: "op" is mode "selective" with that option."""
    ac = config.activation_checkpoint
    ac.mode = "selective" if mode == "op" else mode
    ac.selective_ac_option, ac.offload_inputs = "op", False
    return config


def batches(config: Any, mesh: Mesh) -> list[int]:
    """Local batches to look at; pipelines want a microbatch for each rank."""
    whole = config.training.global_batch_size
    if whole > 0:
        return [whole // mesh.data] if whole % mesh.data == 0 else []
    return [
        batch for batch in BATCHES if batch >= mesh.pp and batch <= MOST * mesh.ranks // mesh.data
    ]


def meshes(args: FluxModelArgs, ranks: int, node: int) -> Iterator[Mesh]:
    """Meshes of so many ranks that the model can be cut by, tensor groups within a node."""
    blocks = args.depth + args.depth_single_blocks
    for pp in _divisors(ranks):
        if pp > min(8, blocks):
            continue
        for tp in _divisors(ranks // pp):
            if tp > node or args.num_heads % tp:
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


def cost(config: Any, args: FluxModelArgs, mesh: Mesh, own: int, machine: Machine) -> Cost:
    """Seconds of a step, by the speeds of `machine`; `own`: as of `step_messages`."""
    batch, ac = config.training.local_batch_size, config.activation_checkpoint
    peers = mesh.cp * mesh.tp * mesh.pp
    microbatches = microbatches_of(config, mesh)
    images = batch * microbatches
    size = config.training.image_size
    useful = flops_per_image(args, size, config.encoder.max_t5_encoding_len) * images / peers
    useful /= machine.flops
    mode = "op" if ac.mode == "selective" else ac.mode
    again = useful * AGAIN.get(mode, 0.0)
    waited = beside = 0.0
    for message in step_messages(config, args, mesh, own):
        seconds = message.sent / machine.speed(message.dimension, mesh)
        waited, beside = (
            (waited, beside + seconds) if message.hidden else (waited + seconds, beside)
        )
    img, text = tokens_of(config, args)
    samples = batch if mesh.pp == 1 else config.parallelism.pipeline_parallel_microbatch_size
    small = (useful + again) * machine.few * mesh.cp / (samples * (img + text))
    compute = useful + again + small
    return Cost(
        compute=compute,
        again=again,
        small=small,
        waited=waited,
        exposed=max(0.0, beside - compute),
        bubble=_bubble(config, mesh),
        images=images / peers,
    )


def _bubble(config: Any, mesh: Mesh) -> float:
    """Share of a step that a pipeline rank waits: (p - 1) / (m + p - 1) for 1F1B and GPipe."""
    size = config.parallelism.pipeline_parallel_microbatch_size
    count = max(1, config.training.local_batch_size // size)
    return (mesh.pp - 1) / (count + mesh.pp - 1)


def step_messages(config: Any, args: FluxModelArgs, mesh: Mesh, own: int) -> list[Message]:
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


def why_nothing_fits(config: Any, args: FluxModelArgs, ranks: int, memory: float) -> str:
    """What to change where no mesh fits: what full sharding needs, and its greatest part."""
    mesh = Mesh(shard=ranks)
    plan = with_checkpointing(with_mesh(config, mesh), "full")
    plan.training.local_batch_size = 1
    found = Fitted(plan, args, mesh).estimate(mesh, 1)
    phase = max(found.phases, key=found.phases.__getitem__)
    return (
        f"nothing fits {memory / GIB:.1f} GiB on {ranks} ranks: {mesh} with full checkpointing and "
        f"batch 1 needs {found.reserved / GIB:.1f}, {found.standing / GIB:.1f} of it parameters, "
        f"optimizer and encoders, and {found.phases[phase] / GIB:.1f} in its dearest phase "
        f"({phase}); more ranks share more"
    )
