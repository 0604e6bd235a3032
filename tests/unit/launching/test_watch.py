"""What the launcher sees of a process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from torchtitan_flux.launching.watch import process_state


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_runs_is_stopped_and_ends():
    with subprocess.Popen(["sleep", "60"]) as process:
        assert process_state(process.pid) in "RSD"  # D: it is still being read from the disk
        process.send_signal(signal.SIGSTOP)
        end = time.monotonic() + 5
        while process_state(process.pid) != "T":
            assert time.monotonic() < end
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_state(process.pid) is None, "nobody has asked for its status yet"
    assert process_state(process.pid) is None
