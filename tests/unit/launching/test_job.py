"""What the launcher adds to the environment of its ranks, and how it ends with them."""

import os
import signal
import sys
import threading
import time
from typing import Any

import pytest

from torchtitan_flux.launching.job import ALLOCATOR, FAILED, MISCONFIGURED, Job, unset
from torchtitan_flux.launching.settings import Settings

QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("given", "ranks", "added"),
    [
        ({}, 1, {**QUIET, **EXPANDABLE}),
        ({}, 2, {**QUIET, **EXPANDABLE, "OMP_NUM_THREADS": "1"}),
        ({"OMP_NUM_THREADS": "8", "TORCH_CPP_LOG_LEVEL": "INFO"}, 4, EXPANDABLE),
        *(({name: ""}, 1, QUIET) for name in ALLOCATOR),  # set to torch's own choice
    ],
)
def test_what_is_unset_is_added_and_what_is_set_stays(given, ranks, added):
    assert unset(given, ranks) == added


RANK = """
import os, pathlib, signal, sys, time
from torchtitan_flux.training.heartbeat import Heartbeat
rank, what = os.environ["RANK"], sys.argv[1]
Heartbeat().beat(7, "data")
if what == "raise" and rank == "1":
    raise KeyboardInterrupt("on purpose")  # no Exception: torchrun's @record would pass it
if what == "crash" and rank == "1":
    os.kill(os.getpid(), signal.SIGSEGV)
if what == "refuse":
    sys.exit(2)
if what == "save":
    pathlib.Path(f"ready-{rank}").touch()
    signal.sigwait([signal.SIGTERM])
    pathlib.Path(f"saved-{rank}").touch()
    sys.exit(0)
if what == "stuck":
    pathlib.Path(f"ready-{rank}").touch()
if what in ("stuck", "raise", "crash"):
    time.sleep(60)
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job of two ranks that do as they are told, the second of them not shown."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "told.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.pathsep.join(sys.path)}")
    monkeypatch.setattr("torchtitan_flux.launching.job.PATIENCE", 0.3)

    def make(what: str, **settings: Any) -> Job:
        saves = what in ("save", "stuck")
        return Job(Settings(2, **settings), "told", [what], tmp_path / "logs", saves, 10)

    return make


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raise", "failed in step 7 (data):\nTraceback"),
        ("crash", "died of SIGSEGV in step 7 (data)\n1 other rank was stopped."),
    ],
)
def test_a_failure_is_reported_with_its_step_and_ends_the_others(job, what, said, capsys):
    begin = time.monotonic()
    assert job(what).run() == FAILED
    assert time.monotonic() - begin < 30, "nobody waited for rank 0"
    text = capsys.readouterr().err
    assert text.startswith("torchtitan-flux: rank 1 (pid ")
    assert said in text
    assert "output of the ranks that were not shown: " in text


def test_ranks_that_refuse_and_ranks_that_are_done(job, capsys):
    assert job("refuse").run() == MISCONFIGURED
    assert job("nothing").run() == 0
    assert capsys.readouterr().err == "", "the rank has said it"


def signal_when_ready(folder, *numbers: signal.Signals, apart: float = 0.0) -> None:
    def send() -> None:
        while not all((folder / f"ready-{rank}").exists() for rank in (0, 1)):
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(apart)

    threading.Thread(target=send, daemon=True).start()


def test_signals_within_a_second_are_one_request_and_the_ranks_save(job, tmp_path, capsys):
    """A terminal's Ctrl-C, forwarded by what started the launcher, by another name even."""
    signal_when_ready(tmp_path, signal.SIGINT, signal.SIGINT, signal.SIGTERM)
    handler = signal.getsignal(signal.SIGTERM)
    assert job("save").run() == 0
    assert capsys.readouterr().err.count("the ranks finish their step and save") == 1
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(
    ("numbers", "grace", "said"),
    [
        ((signal.SIGTERM,), 0, "not saved within GRACE = 0 s: last sign of rank"),
        ((signal.SIGTERM, signal.SIGINT), 600, "SIGINT again: ending all ranks"),
    ],
)
def test_ranks_that_do_not_leave_are_killed(job, tmp_path, numbers, grace, said, capsys):
    signal_when_ready(tmp_path, *numbers, apart=1.2)
    one = job("stuck", grace=grace)
    assert one.run() == FAILED
    assert said in capsys.readouterr().err
    assert all(rank.wait(10) == -signal.SIGKILL for rank in one._ranks.values())
