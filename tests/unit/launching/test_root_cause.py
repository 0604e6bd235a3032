"""Which of the ranks that did not end well failed first, and what is said of it."""

from typing import Any

import pytest

from torchtitan_flux.launching.root_cause import RankExit, report, root_cause
from torchtitan_flux.training.heartbeat import Beat

NOW = 1000.0
GLOO = "Traceback …\nRuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer"
OWN = "Traceback (most recent call last):\n  …\nValueError: on purpose"


def end(
    rank: int, status: int = -9, failed: float = NOW, phase: str = "data", sign: float = 1.0,
    **more: Any,
) -> RankExit:  # fmt: skip
    """`sign`: seconds since the last beat."""
    beat = Beat(NOW - sign, 12, phase)
    return RankExit(rank, 100 + rank, status, failed, beat, **more)


CASES = {
    "an exception comes before what it brings about": (
        [end(0, 1, NOW + 1, traceback=GLOO), end(1, 1, NOW, traceback=OWN), end(2, killed=True)],
        ["rank 1 (pid 101) failed in step 12 (data):", OWN, "2 other ranks were stopped."],
    ),
    "a signal from outside too": (
        [end(0, 1, NOW + 1, traceback=GLOO), end(1, -9, NOW)],
        ["rank 1 (pid 101) died of SIGKILL in step 12 (data)", "1 other rank was stopped.",
         "out of memory"],
    ),
    "a rank without a traceback has said itself what was wrong": (
        [end(0, 1, NOW), end(1, 1, NOW + 1, traceback=GLOO)],
        ["rank 0 (pid 100) failed in step 12 (data)\n1 other"],
    ),
    "of ranks that wait the one that fell silent first hangs": (
        [end(0, 1, phase="reducing flags", traceback=GLOO), end(1, sign=103, killed=True),
         end(2, sign=100, killed=True)],
        ["rank 1 (pid 101) hangs: last sign of rank 1 103 s ago, in step 12 (data)\n",
         "rank 0 (pid 100) waited for it in step 12 (reducing flags), until: RuntimeError"],
    ),
    "a rank that died before its first sign": (
        [RankExit(0, 100, -11, NOW, Beat())],
        ["rank 0 (pid 100) died of SIGSEGV before its first sign"],
    ),
    "a rank that hangs before its first sign": (
        [RankExit(0, 100, -9, NOW, Beat(), killed=True)],
        ["rank 0 (pid 100) hangs: last sign of rank 0 never"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("exits", "parts"), CASES.values(), ids=CASES)
def test_the_first_failure_is_reported(exits, parts):
    text = report(exits, len(exits), NOW)
    assert text.startswith(parts[0])
    for part in parts:
        assert part in text
    assert f"rank {root_cause(exits).rank} " in text


def test_where_all_lost_a_rank_of_another_machine_that_machine_knows():
    text = report([end(4, 1, traceback=GLOO), end(5, 1, NOW + 1, traceback=GLOO)], 8, NOW)
    assert "rank 4 (pid 104) lost the others" in text
    assert "see the other launchers" in text


def test_ranks_that_did_not_save_in_time():
    text = report([end(0, phase="saving", sign=30, killed=True)], 1, NOW, grace=20)
    assert text.startswith("not saved within GRACE = 20 s: last sign of rank 0 30 s ago")
