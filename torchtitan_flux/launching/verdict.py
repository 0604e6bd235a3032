"""How the ranks ended -> whose fault it was, in a few lines, and the launcher's exit status."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from torchtitan_flux.training.heartbeat import Beat

DONE, FAILED, MISCONFIGURED = 0, 1, 2

# How a rank fails whose peer is gone or silent: gloo, nccl, the store.
VICTIM = re.compile(
    r"gloo|nccl|DistBackendError|DistNetworkError|DistStoreError|Connection (reset|closed|refused)"
    r"|[Tt]imed out|socket",
)
STATES = {"T": "its process is stopped", "t": "a debugger holds it", "D": "it waits in the kernel"}


@dataclass(frozen=True)
class End:
    """How a rank that did not end well did end."""

    rank: int
    pid: int
    exitcode: int
    """Negative: the signal that ended it."""
    beat: Beat | None
    state: str
    """State letter of its process before the first failure."""
    killed: bool
    """Whether the launcher ended it."""
    traceback: str = ""

    @property
    def status(self) -> int | None:
        """The status it left with of its own accord, None where a signal ended it."""
        if self.beat is not None and self.beat.left:
            return self.beat.left
        return self.exitcode if self.exitcode > 0 else None

    @property
    def place(self) -> str:
        return "before its first sign" if self.beat is None else self.beat.place

    @property
    def name(self) -> str:
        return f"rank {self.rank} (pid {self.pid})"

    @property
    def last_line(self) -> str:
        lines = self.traceback.strip().splitlines()
        return lines[-1] if lines else ""

    @property
    def is_victim(self) -> bool:
        """Whether it failed because it waited for another rank."""
        return self.status not in (None, 2) and bool(VICTIM.search(self.last_line))


@dataclass(frozen=True)
class Verdict:
    """What the launcher says last, and its exit status."""

    status: int
    lines: tuple[str, ...]
    culprit: End
    """The rank that the report is about."""


def judge(ends: Sequence[End], failed_at: float, ranks: int, grace: int | None = None) -> Verdict:
    """Find the rank that is to blame among those that did not end with status 0.

    Args:
        ends: at least one, all of this node.
        failed_at: when the first failure was seen.
        ranks: of the whole run.
        grace: given where ranks had to be ended because they did not stop within that time.
    """
    by_time = sorted(ends, key=lambda end: end.beat.time if end.beat else 0.0)
    silent = [end for end in by_time if end.killed]
    died = [end for end in by_time if end.status is None and not end.killed]
    raised = [end for end in by_time if end.status is not None]

    if grace is not None and silent:
        late = _most_silent(silent)
        line = f"not saved within GRACE = {grace} s: {_silence(late, failed_at)}"
        return Verdict(FAILED, (line, _others(late, ranks)), late)
    if wrong := [end for end in raised if end.status == MISCONFIGURED]:
        return Verdict(MISCONFIGURED, (), wrong[0])
    # A signal that nobody here sent comes first: what the others raise follows from it. SIGTERM is
    # how torchrun ends those that are left.
    if killed := [end for end in died if end.exitcode != -signal.SIGTERM]:
        return _death(killed[0], ranks)
    if own := [end for end in raised if not end.is_victim]:
        first = own[0]
        end = ":" if first.traceback else ""  # without one, it has said itself what was wrong
        lines = (f"{first.name} failed {first.place}{end}", first.traceback.rstrip())
        return Verdict(FAILED, (*(line for line in lines if line), _others(first, ranks)), first)
    if silent:
        hangs = _most_silent(silent)
        lines = [f"{hangs.name} hangs: {_silence(hangs, failed_at)}", _others(hangs, ranks)]
        if raised:
            lines.insert(1, f"{raised[0].name} waited for it {raised[0].place}, until: "
                            f"{raised[0].last_line}")  # fmt: skip
        return Verdict(FAILED, tuple(lines), hangs)
    if died:
        return _death(died[0], ranks)
    first = raised[0]
    lines = (
        f"{first.name} lost the others {first.place}: {first.last_line}",
        "No rank of this node failed first; see what the launchers of the other nodes say."
        if len(ends) < ranks
        else _others(first, ranks),
    )
    return Verdict(FAILED, lines, first)


def _death(end: End, ranks: int) -> Verdict:
    number = -end.exitcode
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    lines = [f"{end.name} died of {name} {end.place}", _others(end, ranks)]
    if number == signal.SIGKILL:
        lines.append("Without a person or a scheduler behind it, that is the kernel out of memory.")
    return Verdict(FAILED, tuple(lines), end)


def _most_silent(ends: list[End]) -> End:
    """Ranks go in step: who stopped signing first is the one that the others wait for."""
    return min(ends, key=lambda e: (e.state not in STATES, e.beat.time if e.beat else 0.0))


def _silence(end: End, now: float) -> str:
    if end.beat is None:
        return f"{end.name} gave no sign"
    text = f"last sign of rank {end.rank} {max(0.0, now - end.beat.time):.0f} s ago, {end.place}"
    return f"{text}; {STATES[end.state]}" if end.state in STATES else text


def _others(end: End, ranks: int) -> str:
    if ranks == 1:
        return ""
    return f"{ranks - 1} other rank{'s were' if ranks > 2 else ' was'} stopped."
