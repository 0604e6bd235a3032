"""A dump folder belongs to one live run."""

import os
import signal
import subprocess
import sys

import pytest

from torchtitan_flux.startup.load_config import ConfigError
from torchtitan_flux.training.run_folder import lock_run_folder


def test_a_second_run_is_refused_and_told_by_whom(tmp_path):
    lock = lock_run_folder(tmp_path / "run")
    assert lock is not None
    if (pid := os.fork()) == 0:
        os._exit(0)  # its copy is closed already
    os.waitpid(pid, 0)
    with pytest.raises(ConfigError, match=r"job\.dump_folder") as caught:
        lock_run_folder(tmp_path / "run")
    for part in (str(tmp_path / "run"), f"pid {os.getpid()}", os.uname().nodename):
        assert part in str(caught.value)
    other = lock_run_folder(tmp_path / "other")
    lock.release()
    again = lock_run_folder(tmp_path / "run")
    for one in (again, other):
        assert one is not None
        one.release()


HOLD_AND_FORK = """
import os, sys, time
from torchtitan_flux.training.run_folder import lock_run_folder
lock = lock_run_folder(sys.argv[1])
pid = os.fork()
if pid == 0:
    time.sleep(60)
print(pid, flush=True)
time.sleep(60)
"""


def test_the_lock_goes_with_its_process_even_if_a_worker_lives_on(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_AND_FORK, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        worker = int(holder.stdout.readline())
        with pytest.raises(ConfigError, match=f"pid {holder.pid}"):
            lock_run_folder(tmp_path)
        holder.kill()
        holder.wait()
        os.kill(worker, 0)
        lock = lock_run_folder(tmp_path)
        assert lock is not None
        lock.release()
        os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_is_said_and_passed_over(tmp_path, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert lock_run_folder(tmp_path) is None
    assert "start no second run there" in caplog.text
