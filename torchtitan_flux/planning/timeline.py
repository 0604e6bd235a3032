"""What is alive in a training step, piece by piece, and the same for more blocks of a kind."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torchtitan_flux.model import FluxModelArgs

Messages = dict[tuple[str, str], int]
"""(kind of collective, dimension of the mesh) -> bytes, or how often."""

KINDS = ("double_blocks", "single_blocks")


def blocks_of(args: FluxModelArgs) -> dict[str, int]:
    """Blocks of each kind."""
    return dict(zip(KINDS, (args.depth, args.depth_single_blocks), strict=True))


@dataclass(frozen=True)
class Segment:
    """A piece of a step, such as the forward pass of one block. Bytes on one rank.

    Attributes:
        phase: "begin", "forward", "backward" …
        kind: a value of KINDS, or empty for what there is once.
        number: of the block.
        kept: more alive at the end than at the beginning.
        rise: most alive at any moment, beyond what was at the beginning.
        sent, calls: messages of this rank.
    """

    phase: str
    kind: str = ""
    number: int = 0
    kept: int = 0
    rise: int = 0
    sent: Messages = field(default_factory=dict)
    calls: Messages = field(default_factory=dict)


@dataclass(frozen=True)
class Timeline:
    """A step, in its order."""

    segments: Sequence[Segment]

    @property
    def peak(self) -> int:
        """Most bytes at any moment, beyond what was there before."""
        alive = peak = 0
        for segment in self.segments:
            peak = max(peak, alive + segment.rise)
            alive += segment.kept
        return peak

    @property
    def activations(self) -> int:
        """Bytes at the end of the (last) forward pass, beyond what was there before it."""
        alive = 0
        before = held = 0
        was_forward = False
        for segment in self.segments:
            forward = segment.phase == "forward"
            if forward and not was_forward:
                before = alive
            alive += segment.kept
            if forward:
                held = alive - before
            was_forward = forward
        return held

    def sent(self) -> Messages:
        """Bytes of the whole step."""
        return dict(sum((Counter(s.sent) for s in self.segments), Counter()))

    def calls(self) -> Messages:
        """Collectives of the whole step."""
        return dict(sum((Counter(s.calls) for s in self.segments), Counter()))

    def repeated(self, counts: dict[str, int]) -> "Timeline":
        """As if there were so many blocks of each kind.

        Args:
            counts: kind -> blocks; where three were run, the one in the middle stands for all but
                the first and the last.
        """
        shown = {k: len({s.number for s in self.segments if s.kind == k}) for k in KINDS}
        segments: list[Segment] = []
        for segment in self.segments:
            times = 1
            if segment.kind and segment.number == 1 and shown[segment.kind] == 3:
                times = counts[segment.kind] - 2
            segments += [replace(segment)] * times
        return Timeline(segments)
