"""Which rank failed first, and what the launcher says of it."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from torchtitan_flux.training.heartbeat import Beat

COLLECTIVE_ERROR = re.compile(r"gloo|nccl|Dist(Backend|Network|Store)Error", re.IGNORECASE)
"""In the message of a rank that has waited in vain for another one."""


@dataclass(frozen=True)
class RankExit:
    """How a rank ended that did not end with status 0.

    Attributes:
        status: negative: the signal that ended it.
        time: the earliest moment at which it can have failed.
        beat: its last sign.
        traceback: of torchrun's error file.
        killed: whether the launcher killed it.
    """

    rank: int
    pid: int
    status: int
    time: float
    beat: Beat
    traceback: str = ""
    killed: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid})"

    @property
    def message(self) -> str:
        """Last line of the traceback."""
        return self.traceback.strip().rpartition("\n")[2]


def root_cause(exits: Sequence[RankExit]) -> RankExit:
    """The rank that failed first; of those that waited for a rank that hangs, that one."""
    failed = sorted((e for e in exits if not e.killed), key=lambda e: e.time)
    hung = [e for e in exits if e.killed]
    if failed and not (hung and COLLECTIVE_ERROR.search(failed[0].message)):
        return failed[0]
    # ranks go in step: who stopped signing first is the one that the others wait for
    return min(hung, key=lambda e: e.beat.time)


def report(
    exits: Sequence[RankExit], ranks: int, failed_at: float, grace: int | None = None
) -> str:
    """What the launcher says last.

    Args:
        exits: of this machine's ranks.
        ranks: of the whole run.
        failed_at: when the first failure was seen.
        grace: set where ranks were killed for not saving within this many seconds.
    """
    cause = root_cause(exits)
    place = cause.beat.place
    others = [f"{ranks - 1} other rank{'s were' if ranks > 2 else ' was'} stopped."][: ranks - 1]
    if cause.killed:
        ago = f"{failed_at - cause.beat.time:.0f} s ago, {place}" if cause.beat.phase else "never"
        how = f"{cause} hangs" if grace is None else f"not saved within GRACE = {grace} s"
        waited = [
            f"{e} waited for it {e.beat.place}, until: {e.message}" for e in exits if e.message
        ]
        lines = [f"{how}: last sign of rank {cause.rank} {ago}", *waited[:1], *others]
    elif cause.status < 0:
        signals = {number.value: number.name for number in signal.Signals}
        name = signals.get(-cause.status, f"signal {-cause.status}")
        lines = [f"{cause} died of {name} {place}", *others]
        if name == "SIGKILL":
            lines.append("Unless somebody killed it, the kernel was out of memory.")
    elif COLLECTIVE_ERROR.search(cause.message) and len(exits) < ranks:
        lines = [f"{cause} lost the others {place}: {cause.message}",
                 "No rank of this machine failed first; see the other launchers."]  # fmt: skip
    elif cause.traceback:
        lines = [f"{cause} failed {place}:", cause.traceback.rstrip(), *others]
    else:  # it has logged its error itself
        lines = [f"{cause} failed {place}", *others]
    return "\n".join(lines)
