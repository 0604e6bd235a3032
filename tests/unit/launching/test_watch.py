"""What the launcher sees of a process, and which signals it takes for a request."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from torchtitan_flux.launching import watch as watch_module
from torchtitan_flux.launching.output import RankOutput
from torchtitan_flux.launching.watch import Watch, process_state


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_runs_is_stopped_and_ends():
    with subprocess.Popen(["sleep", "60"]) as process:
        assert process_state(process.pid) in "RSD"  # D: it is still being read from the disk
        process.send_signal(signal.SIGSTOP)
        end = time.monotonic() + 60
        while process_state(process.pid) != "T":
            assert time.monotonic() < end
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_state(process.pid) is None, "nobody has asked for its status yet"
    assert process_state(process.pid) is None


def test_signals_within_a_second_are_one_stop_and_a_later_one_ends_all(
    tmp_path, monkeypatch, capsys
):
    """A terminal's Ctrl-C, forwarded by what started the launcher, by another name even."""
    left = threading.Event()
    monkeypatch.setattr(Watch, "_leave_at_once", lambda self: left.set())
    output = RankOutput(frozenset({0}), tmp_path, tmp_path)
    output.ranks = [0]
    with Watch(tmp_path, output, grace=600, saves=True) as watch:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        end = time.monotonic() + 60
        while watch.requested is None:
            assert time.monotonic() < end
            time.sleep(0.001)
        assert not left.wait(0.3)
        assert capsys.readouterr().err.count("the ranks finish their step and save") == 1
        monkeypatch.setattr(watch_module, "ONE_REQUEST", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert left.wait(60)
    assert capsys.readouterr().err.count("again: ending all ranks") == 1
