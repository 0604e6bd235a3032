"""A signal asks for a stop, a second one leaves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from torchtitan_flux.training import stopping
from torchtitan_flux.training.stopping import StopSignals


def wait_for(told: Callable[[], bool]) -> None:
    """Until the thread that reads signals has done so."""
    end = time.monotonic() + 300
    while not told():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_and_handlers_are_given_back(number, caplog):
    caplog.set_level("INFO")
    before = {s: signal.getsignal(s) for s in stopping.SIGNALS}
    signals = StopSignals()
    assert not signals.requested
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # at once: Slurm's and the launcher's are one request
    said = "stopping at the next step boundary; a second signal leaves"
    wait_for(lambda: said in caplog.text)
    assert signals.requested
    signals.uninstall()
    assert {s: signal.getsignal(s) for s in stopping.SIGNALS} == before
    assert caplog.text.count(said) == 1


HELD_BACK = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
os.kill(os.getpid(), signal.SIGTERM)
from torchtitan_flux.training.stopping import StopSignals
signals = StopSignals()
while not signals.requested:
    pass
assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""


def test_a_signal_that_was_held_back_until_now_counts():
    subprocess.run([sys.executable, "-c", HELD_BACK], check=True, timeout=300)


STUCK = """
import ctypes, os, signal
from torchtitan_flux.training.stopping import StopSignals
signals = StopSignals()
print("ready", flush=True)
while not signals.requested:
    pass
print("requested", flush=True)
libc = ctypes.CDLL(None)
while True:  # a collective that never ends: the main thread runs no Python
    libc.sleep(60)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_leaves_at_once_even_out_of_a_stuck_call(number, status):
    with subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "requested\n"
        time.sleep(stopping.ONE_REQUEST + 0.2)
        process.send_signal(number)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == status
    assert errors.splitlines()[-1] == f"{number.name}: left without saving"
