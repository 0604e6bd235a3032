"""A process ends with the one that started it."""

import os
import subprocess
import sys
import time

import pytest

PARENT = """
import multiprocessing, os, sys, time
from torchtitan_flux.lifetime import die_with_parent

def work():
    die_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(60)

multiprocessing.get_context("fork").Process(target=work).start()
time.sleep(60)
"""

ORPHAN = """
import os
from torchtitan_flux.lifetime import die_with_parent
die_with_parent(os.getppid() + 1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can")
def test_a_worker_dies_with_its_rank():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    end = time.monotonic() + 60
    while _runs(worker):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can")
def test_a_parent_that_is_gone_already_counts():
    assert subprocess.run([sys.executable, "-c", ORPHAN], check=False).returncode == -9


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
