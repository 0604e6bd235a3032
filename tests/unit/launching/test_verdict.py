"""Which of the ranks that did not end well is to blame."""

from typing import Any

from torchtitan_flux.launching.verdict import End, judge
from torchtitan_flux.training.heartbeat import Beat

NOW = 1000.0
GLOO = "Traceback …\nRuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer"
NCCL = "Traceback …\ntorch.distributed.DistBackendError: NCCL communicator was aborted"
OWN = "Traceback (most recent call last):\n  …\nValueError: on purpose"


def end(
    rank: int,
    exitcode: int,
    step: int = 12,
    phase: str = "data",
    at: float = NOW - 1,
    left: int | None = None,
    **more: Any,
) -> End:
    beat = Beat(rank, 100 + rank, step, phase, at, left)
    return End(rank, 100 + rank, exitcode, beat, **{"state": "S", "killed": False, **more})


def test_an_exception_of_its_own_is_told_in_full_whatever_the_others_raise():
    verdict = judge(
        [
            end(0, 1, left=1, at=NOW - 2, traceback=GLOO),
            end(1, 1, left=1, traceback=OWN),
            end(2, -9, killed=True),
        ],
        NOW,
        3,
    )
    assert verdict.status == 1
    assert verdict.lines == (
        "rank 1 (pid 101) failed in step 12 (data):",
        OWN,
        "2 other ranks were stopped.",
    )


def test_a_signal_that_nobody_here_sent_comes_before_what_the_others_raise():
    verdict = judge(
        [end(0, 1, left=1, traceback=NCCL), end(1, -9, phase="forward/backward")], NOW, 2
    )
    assert verdict.lines[0] == "rank 1 (pid 101) died of SIGKILL in step 12 (forward/backward)"
    assert verdict.lines[1] == "1 other rank was stopped."
    crashed = judge([end(0, -11), end(1, -15)], NOW, 2)
    assert crashed.lines[0].startswith("rank 0 (pid 100) died of SIGSEGV")


def test_a_crash_after_the_rank_said_that_it_left_well():
    verdict = judge([end(0, -11, left=0)], NOW, 1)
    assert verdict.status == 1
    assert "died of SIGSEGV" in verdict.lines[0]


def test_among_ranks_that_wait_the_one_that_fell_silent_first_hangs():
    verdict = judge(
        [
            end(0, 1, phase="agreeing", left=1, traceback=GLOO),
            end(1, -9, phase="data", at=NOW - 103, killed=True),
            end(2, -9, phase="agreeing", at=NOW - 100, killed=True),
        ],
        NOW,
        3,
    )
    assert verdict.lines[0] == (
        "rank 1 (pid 101) hangs: last sign of rank 1 103 s ago, in step 12 (data)"
    )
    assert (
        "rank 0 (pid 100) waited for it in step 12 (agreeing), until: RuntimeError"
        in (verdict.lines[1])
    )


def test_a_stopped_process_hangs_even_if_another_fell_silent_before():
    verdict = judge(
        [
            end(0, 1, left=1, traceback=GLOO),
            end(1, -9, at=NOW - 103, killed=True),
            end(2, -9, at=NOW - 100, killed=True, state="T"),
        ],
        NOW,
        3,
    )
    assert verdict.culprit.rank == 2
    assert verdict.lines[0].endswith("in step 12 (data); its process is stopped")


def test_where_all_lost_a_rank_of_another_node_that_node_knows():
    verdict = judge([end(4, 1, left=1, traceback=GLOO), end(5, 1, left=1, traceback=GLOO)], NOW, 8)
    assert "lost the others" in verdict.lines[0]
    assert "other nodes" in verdict.lines[1]


def test_a_refused_configuration_has_been_told_by_the_rank():
    verdict = judge([end(0, 2, left=2), end(1, -15)], NOW, 2)
    assert (verdict.status, verdict.lines, verdict.culprit.rank) == (2, (), 0)


def test_ranks_that_did_not_save_in_time():
    verdict = judge([end(0, -9, at=NOW - 30, phase="saving", killed=True)], NOW, 1, grace=20)
    assert verdict.status == 1
    assert verdict.lines[0] == (
        "not saved within GRACE = 20 s: last sign of rank 0 30 s ago, in step 12 (saving)"
    )


def test_a_rank_that_died_before_its_first_sign():
    verdict = judge([End(0, 100, -9, None, "?", False)], NOW, 1)
    assert verdict.lines[0] == "rank 0 (pid 100) died of SIGKILL before its first sign"
