"""What a rank sends in a step, in closed form; a test compares it with a counted dry run.

Bytes are those that one rank sends when collectives run on rings (tracker.ring_bytes).
"""

from dataclasses import dataclass

from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.planning.tracker import ring_bytes


@dataclass(frozen=True)
class Mesh:
    """Degrees of [parallelism]; the ranks of a context group also share the weights' shards."""

    replicate: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.cp * self.tp * self.pp

    @property
    def data(self) -> int:
        """Ranks that read different samples."""
        return self.replicate * self.shard

    @property
    def fsdp(self) -> int:
        """Ranks that a weight is sharded over."""
        return self.shard * self.cp

    def __str__(self) -> str:
        names = ("replicate", "shard", "cp", "tp", "pp")
        return (
            ",".join(f"{n}={getattr(self, n)}" for n in names if getattr(self, n) > 1) or "shard=1"
        )


@dataclass(frozen=True)
class Message:
    """A kind of collective in a step.

    Attributes:
        what: for people.
        kind: of tracker.COLLECTIVES.
        dimension: ranks that take part: fsdp, replicate, cp, tp or pp.
        sent: bytes that this rank sends.
        hidden: whether it can go on while the rank computes.
    """

    what: str
    kind: str
    dimension: str
    sent: int
    hidden: bool


def messages(
    args: FluxModelArgs,
    mesh: Mesh,
    parameters: int,
    batch: int,
    img_tokens: int,
    text_tokens: int,
    recomputed: float = 0.0,
    microbatches: int = 1,
    compute_bytes: int = 2,
    reduce_bytes: int = 4,
    reshard: bool = True,
) -> list[Message]:
    """Everything of size that a rank sends; norms, losses and vectors are left out.

    Args:
        args: the model.
        mesh: its degrees.
        parameters: elements of this rank's part of the model before it is sharded, that is of all
            ranks of its fsdp group together.
        batch: samples of a rank and microbatch.
        img_tokens, text_tokens: of a sample.
        recomputed: share of blocks that are run again, with their messages, in the backward pass.
        microbatches: of a step, their gradients summed.
        compute_bytes, reduce_bytes: of an element of gathered weights, and of reduced gradients.
        reshard: whether weights are gathered again for the backward pass.
    """
    passes = 2 + recomputed
    blocks = args.depth + args.depth_single_blocks
    streams = sum(-(-tokens // mesh.cp) for tokens in (img_tokens, text_tokens))
    hidden = batch * streams * args.hidden_size * compute_bytes
    # a gathered block stays until the last microbatch: FSDP2 without gradient synchronisation
    gathers = (microbatches + 1 if reshard else 1) * compute_bytes * parameters
    reduced = reduce_bytes * parameters
    stage = 1 / mesh.pp
    tensor = 2 * args.depth + args.depth_single_blocks
    found = [
        ("weights", "all-gather", "fsdp", ring_bytes("all-gather", mesh.fsdp, gathers), True),
        (
            "gradients",
            "reduce-scatter",
            "fsdp",
            ring_bytes("reduce-scatter", mesh.fsdp, reduced),
            True,
        ),
        (
            "gradients of replicas",
            "all-reduce",
            "replicate",
            ring_bytes("all-reduce", mesh.replicate, reduced // mesh.fsdp),
            True,
        ),
        (
            "partial sums of linears",
            "all-reduce",
            "tp",
            int(passes * tensor * stage * microbatches * ring_bytes("all-reduce", mesh.tp, hidden)),
            False,
        ),
        (
            "heads for tokens",
            "all-to-all",
            "cp",
            int(
                passes
                * blocks
                * stage
                * microbatches
                * ring_bytes("all-to-all", mesh.cp, 4 * hidden // mesh.tp)
            ),
            False,
        ),
        (
            "hidden states of stages",
            "send",
            "pp",
            int(2 * hidden * microbatches * (mesh.pp - 1) / mesh.pp),
            False,
        ),
    ]
    return [Message(*message) for message in found if message[3]]
