"""How a run ends other than by its last step: on request, by a fault, or by force.

Through the real launcher, ranks of their own; a start takes ten seconds, hence few of them.
"""

import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

QUIET = ("--validation.no-enable", "--sampling.no-enable", "--score.no-enable",
         "--metrics.no-enable-tensorboard")  # fmt: skip
ENDLESS = (*QUIET, "--training.steps", "100000", "--metrics.log_freq", "1", "--debug.seed", "3",
           "--training.local_batch_size", "16", "--checkpoint.interval", "100000")  # fmt: skip


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """A test that fails half-way must not leave a run that slows down all that follow."""
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()  # its ranks die with it
        process.wait()


class Run:
    """run_train.sh in the background; its output so far in `output`."""

    def __init__(self, cwd: Path, *arguments: str, terminal: bool = False, **variables: object):
        environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
                       **{name: str(value) for name, value in variables.items()}}  # fmt: skip
        ours, theirs = pty.openpty() if terminal else os.pipe()
        self.process = subprocess.Popen(
            [str(REPO / "run_train.sh"), *arguments],
            cwd=cwd,
            env=environment,
            stdin=theirs if terminal else subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_control_terminal if terminal else None,
        )
        STARTED.append(self.process)
        os.close(theirs)
        self.descriptor = ours
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # a terminal that its last process has closed
            while block := os.read(self.descriptor, 65536):
                self.output += block.decode(errors="replace")

    def until(self, pattern: str, seconds: float = 300) -> None:
        """Wait until the output has it."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.output):
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.02)

    def ended(self, seconds: float = 300) -> int:
        """Wait for the end; returns the exit status."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running:\n{self.output}") from None
        self._reader.join(20)
        return status

    def pids(self) -> list[int]:
        """Every process that came of it, except the launcher."""
        mark = f"FLUX_LAUNCHER={self.process.pid}".encode()
        return [pid for pid, environ in _processes() if mark in environ]

    def rank(self, rank: int) -> int:
        """Process id of a rank."""
        (pid,) = [
            pid
            for pid, environ in _processes()
            if f"RANK={rank}".encode() in environ and _parent(pid) == self.process.pid
        ]
        return pid

    def report(self) -> list[str]:
        """What the launcher said last, by line."""
        return self.output[self.output.rindex("torchtitan-flux: rank") :].splitlines()


def _control_terminal() -> None:
    """The new session takes the terminal for its own, so that Ctrl-C reaches it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _processes() -> list[tuple[int, list[bytes]]]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                environ = (folder / "environ").read_bytes().split(b"\0")
                found.append((int(folder.name), environ))  # nothing in it once a process has ended
    return found


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def losses(output: str) -> dict[int, str]:
    """Loss by step, as printed."""
    return {int(s): x for s, x in re.findall(r"step: +(\d+) .*?loss: +([\d.]+)", output)}


# ---- a rank fails ---------------------------------------------------------------------------


FAULTY = """
import os

import torch

import torchtitan_flux.training.train_spec

calls = 0
step = torch.optim.AdamW.step

def fail_third(self, *args, **kwargs):
    global calls
    calls += 1
    if calls == 3:
        raise ValueError("on purpose")
    return step(self, *args, **kwargs)

if os.environ.get("RANK") == "1":
    torch.optim.AdamW.step = fail_third
"""


def test_an_exception_is_told_once_and_last_even_of_a_rank_that_is_not_shown(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    argv = (*ENDLESS, "--experimental.custom_import", "faulty")
    run = Run(tmp_path, *argv, NGPU=2, PYTHONPATH=f"{tmp_path}:{REPO}")
    assert run.ended() == 1
    assert re.match(r"torchtitan-flux: rank 1 \(pid \d+\) failed in step 3 \(", run.report()[0])
    assert "ValueError: on purpose" in run.report()
    assert run.output.count("Traceback") == 1
    assert "ChildFailedError" not in run.output
    logs = Path(tmp_path, run.report()[-1].split(": ")[-1])
    assert "Compute type is float32" in (logs / "rank-1.log").read_text()


@pytest.mark.long
def test_a_rank_that_hangs_is_named(tmp_path):
    """Only the ranks that wait for it fail, and it is not they who are at fault."""
    run = Run(tmp_path, *ENDLESS, "--comm.train_timeout_seconds", "3", NGPU=2)
    run.until("step: +3 ")
    os.kill(run.rank(1), signal.SIGSTOP)
    assert run.ended() == 1
    found = re.match(
        r"torchtitan-flux: rank 1 \(pid \d+\) hangs: last sign of rank 1 (\d+) s ago, "
        r"in step (\d+) \(.+\)",
        run.report()[0],
    )
    assert found, run.report()
    assert int(found[1]) >= 3
    assert int(found[2]) >= 3
    assert run.pids() == []


# ---- by force -------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_run_in_a_folder_and_nothing_outlives_the_launcher(tmp_path):
    first = Run(tmp_path, *ENDLESS, "--training.dataloader.num_workers", "1", NGPU=2)
    first.until("step: +2 ")
    assert len(first.pids()) >= 4, "two ranks and their workers"
    second = Run(tmp_path, *ENDLESS, NGPU=2, LOG_RANK=1)
    assert second.ended() == 2
    assert second.output.count("is being written by another run") == 1
    assert f"pid {first.rank(0)}" in second.output
    assert socket.gethostname() in second.output
    assert "job.dump_folder" in second.output
    assert "Traceback" not in second.output
    assert first.process.poll() is None

    first.process.kill()
    first.process.wait()
    end = time.monotonic() + 60
    while left := first.pids():
        assert time.monotonic() < end, left
        time.sleep(0.05)


# ---- on request -----------------------------------------------------------------------------


@pytest.mark.slow
def test_stopped_and_continued_is_the_uninterrupted_run(tmp_path):
    """To the last digit, asked by SIGTERM and by Ctrl-C on a terminal."""
    command = (*ENDLESS, "--training.dataloader.num_workers", "1", "--training.steps", "24")
    output, stopped_at = "", 0
    for step, terminal in ((3, False), (9, True)):
        run = Run(tmp_path, *command, NGPU=2, terminal=terminal)
        run.until(f"step: +{step} ")
        if terminal:
            os.write(run.descriptor, b"\x03")
        else:
            run.process.send_signal(signal.SIGTERM)
        assert run.ended() == 0, run.output
        found = re.search(r"stopped at step (\d+)", run.output)
        assert found, run.output
        assert min(losses(run.output)) == stopped_at + 1
        stopped_at = int(found[1])
        assert "Traceback" not in run.output
        output += run.output
    last = Run(tmp_path, *command, NGPU=2)
    assert last.ended() == 0, last.output
    whole = Run(tmp_path, *command, "--job.dump_folder", "whole", NGPU=2)
    assert whole.ended() == 0, whole.output
    assert list(losses(output + last.output)) == list(range(1, 25))
    assert losses(output + last.output) == losses(whole.output)


@pytest.mark.long
def test_a_stop_while_ranks_are_starting_waits_for_the_first_step(tmp_path):
    """Python takes seconds to import torch; until then a signal would end a rank."""
    run = Run(tmp_path, *ENDLESS, NGPU=2)
    while len(run.pids()) < 2:
        time.sleep(0.01)
    run.process.send_signal(signal.SIGTERM)
    assert run.ended() == 0, run.output
    assert "stopped at step 1 and saved" in run.output


@pytest.mark.long
def test_a_stop_of_one_node_stops_all(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        variables = {"NNODES": 2, "RDZV_ENDPOINT": f"localhost:{free.getsockname()[1]}"}
    nodes = [Run(tmp_path, *ENDLESS, **variables, NODE_RANK=node) for node in range(2)]
    end = time.monotonic() + 300
    while not any(losses(node.output) for node in nodes):
        assert time.monotonic() < end, [node.output for node in nodes]
        time.sleep(0.05)
    assert losses(nodes[0].output)
    assert not nodes[1].output, "its only rank is 1, which is not shown"
    nodes[1].process.send_signal(signal.SIGTERM)
    assert [node.ended() for node in nodes] == [0, 0], [node.output for node in nodes]
    assert "stopped at step" in nodes[0].output + nodes[1].output


# ---- Slurm ----------------------------------------------------------------------------------


FAKES = {
    "scontrol": 'echo "scontrol $*" >>"$CALLS"\n[ "$1" != show ] || printf "node7\\nnode8\\n"',
    "srun": """
echo "srun $1 NNODES=$NNODES NGPU=$NGPU $RDZV_ENDPOINT" >>"$CALLS"
echo $$ >"$CALLS.srun"
shift
trap 'kill $task; wait $task; exit' TERM
SLURM_NODEID=1 "$@" & task=$!
wait $task
""",
    "scancel": 'echo "scancel $*" >>"$CALLS"\nkill -TERM "$(cat "$CALLS.srun")"',
}
JOB = """#!/bin/bash
echo "task NODE_RANK=$NODE_RANK $*" >>"$CALLS"
[ -z "$ENDLESS" ] || { trap 'exit 0' TERM; while :; do sleep 0.05; done; }
exit "${STATUS:-0}"
"""


@pytest.fixture
def slurm(tmp_path):
    """Start scripts/slurm.sh as Slurm would, its commands replaced; returns (process, calls)."""
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
    (tmp_path / "run_train.sh").write_text(JOB)
    for path in (*(tmp_path / "bin").iterdir(), tmp_path / "run_train.sh"):
        path.chmod(0o755)
    calls = tmp_path / "calls"

    def start(**variables: str) -> tuple[subprocess.Popen, Path]:
        environment = {
            **os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CALLS": str(calls),
            "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "123", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_ON_NODE": "8", **variables,
        }  # fmt: skip
        command = ["bash", str(REPO / "scripts/slurm.sh"), "--training.steps", "7 8"]
        return subprocess.Popen(command, env=environment, cwd="/"), calls

    return start


@pytest.mark.parametrize("status", [0, 2])
def test_slurm_starts_one_launcher_for_each_node(slurm, status):
    process, calls = slurm(STATUS=str(status))
    assert process.wait(20) == status
    assert calls.read_text().splitlines() == [
        "scontrol show hostnames node[7-8]",
        "srun --kill-on-bad-exit=1 NNODES=2 NGPU=8 node7:20123",
        "task NODE_RANK=1 --training.steps 7 8",
    ]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_stops_and_requeues_before_the_time_limit(slurm, number):
    process, calls = slurm(ENDLESS="yes")
    end = time.monotonic() + 60
    while not calls.exists() or "task" not in calls.read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.2)  # the task's trap
    process.send_signal(number)
    assert process.wait(20) == 0
    assert calls.read_text().splitlines()[-2:] == [
        "scancel --signal=TERM 123",
        "scontrol requeue 123",
    ]
