"""Starts the ranks of this machine with torchrun's environment, and reports how they ended.

torchrun itself signals whole process groups, loader workers included, gives ranks 30 s to save and
waits for other machines in silence.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore

from torchtitan_flux.launching.joining import NotJoined, join, leave_together
from torchtitan_flux.launching.rank import LAUNCHER
from torchtitan_flux.launching.root_cause import RankExit, report, root_cause
from torchtitan_flux.launching.settings import Settings
from torchtitan_flux.training.heartbeat import FOLDER, read_beat
from torchtitan_flux.training.stopping import ONE_REQUEST

DONE, FAILED, MISCONFIGURED = 0, 1, 2
"""Exit statuses of the launcher, and of a rank."""

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask for a stop; the last is what a lost connection sends."""

PERIOD = 0.1
PATIENCE = 5.0
"""Seconds after the first failure in which the other ranks may leave a traceback of their own.
Those that wait for the failed one on a GPU never would."""

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Variables that set torch's allocator: its newer name, and those of CUDA and ROCm."""

TAIL = 60
"""Last lines shown of the output of a failed rank that is not in LOG_RANK."""


class EndNow(BaseException):
    """A signal after which nothing is waited for."""


@dataclass
class Job:
    """What every rank runs.

    Attributes:
        module: entry point of a rank, with `arguments` for its command line.
        logs: folder for the output of ranks that are not shown.
        saves: whether the ranks save and leave when they are asked to; otherwise they are killed.
        join_timeout: seconds that machines wait for each other.
    """

    settings: Settings
    module: str
    arguments: list[str]
    logs: Path
    saves: bool
    join_timeout: int

    def __post_init__(self) -> None:
        self._ranks: dict[int, subprocess.Popen] = {}
        self._signals: list[tuple[signal.Signals, float]] = []
        self._requested_at: float | None = None
        self._killed: set[int] = set()

    def run(self) -> int:
        """Start the ranks and wait for their end; stderr gets a report.

        Returns:
            exit status: 0 when every rank left with 0, 2 for a configuration that a rank refused,
            1 for anything else.
        """
        before = {number: signal.getsignal(number) for number in STOPS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._on_signal)
        folder = tempfile.TemporaryDirectory(prefix="torchtitan-flux-", ignore_cleanup_errors=True)
        try:
            with folder:
                return self._run(Path(folder.name))
        except (NotJoined, OSError) as error:
            say(f"the ranks were not started: {error}")
        except EndNow as leaving:
            say(str(leaving))
        finally:
            for process in self._ranks.values():
                _kill(process)
            for number, handler in before.items():
                signal.signal(number, handler)
        return FAILED

    def _run(self, folder: Path) -> int:
        s = self.settings
        if s.nodes > 1:
            store = join(s, float(self.join_timeout), say)
            host, _, port = s.endpoint.rpartition(":")
        else:
            store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            host, port = "localhost", str(store.port)
        first = s.node_rank * s.ranks_per_node
        # nodes that start in the same second share it, rank numbers differ
        logs = self.logs / time.strftime("%Y%m%d-%H%M%S")
        if set(range(first, first + s.ranks_per_node)) - s.shown:
            logs.mkdir(parents=True, exist_ok=True)
        self._start(first, {"MASTER_ADDR": host, "MASTER_PORT": port}, folder, logs)
        ended_after, failed_at = self._wait(folder)
        exits = [self._exit(rank, after, folder) for rank, after in ended_after.items()]
        exits = [one for one in exits if one.status != 0]
        if exits:
            return self._report(exits, failed_at, logs)
        if s.nodes > 1:
            leave_together(store, s.nodes)
        return DONE

    def _start(self, first: int, address: dict[str, str], folder: Path, logs: Path) -> None:
        s = self.settings
        common = {
            **os.environ, **unset(os.environ, s.ranks_per_node), **address,
            FOLDER: str(folder), LAUNCHER: str(os.getpid()), "WORLD_SIZE": str(s.ranks),
            "LOCAL_WORLD_SIZE": str(s.ranks_per_node), "TORCHELASTIC_RUN_ID": "torchtitan-flux",
            # rank 0 uses the launcher's store instead of serving one
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        }  # fmt: skip
        command = [sys.executable, "-u", "-m", "torchtitan_flux.launching.rank", self.module]
        # The ranks start with these blocked, until StopSignals handles them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            for local, rank in enumerate(range(first, first + s.ranks_per_node)):
                own = {"RANK": str(rank), "LOCAL_RANK": str(local),
                       "TORCHELASTIC_ERROR_FILE": str(folder / f"error-{rank}.json")}  # fmt: skip
                path = os.devnull if rank in s.shown else logs / f"rank-{rank}.log"
                with open(path, "wb") as file:
                    log = None if rank in s.shown else file
                    self._ranks[rank] = subprocess.Popen(
                        [*command, *self.arguments], env={**common, **own},
                        stdout=log, stderr=log, start_new_session=True,
                    )  # fmt: skip
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _wait(self, folder: Path) -> tuple[dict[int, float], float]:
        """Until all ranks have ended, those that have to be killed too.

        Returns:
            (for each rank a moment before its end, when the first failure was seen).
        """
        ended_after: dict[int, float] = {}
        failed_at = killed_at = None
        looked = time.monotonic()
        while len(ended_after) < len(self._ranks):
            now = time.monotonic()
            left = {rank: read_beat(folder, rank).exit_status for rank in self._ranks}
            for rank, process in self._ranks.items():
                if process.poll() is not None:
                    ended_after.setdefault(rank, looked)
                if failed_at is None and (process.returncode or left[rank]):
                    failed_at = now
            self._handle_signals()
            late = self._requested_at is not None and now - self._requested_at > self.settings.grace
            if late or (failed_at is not None and now - failed_at > PATIENCE):
                killed_at = killed_at or now
                for rank in self._ranks.keys() - ended_after.keys():
                    if left[rank] is None:  # else it was ending by itself
                        self._killed.add(rank)
                    _kill(self._ranks[rank])
                    if now - killed_at > PATIENCE:  # uninterruptible in the kernel
                        ended_after[rank] = now
            looked = now
            time.sleep(PERIOD)
        return ended_after, failed_at or time.monotonic()

    def _exit(self, rank: int, ended_after: float, folder: Path) -> RankExit:
        process, beat, traceback = self._ranks[rank], read_beat(folder, rank), ""
        status = -signal.SIGKILL if process.returncode is None else process.returncode
        if beat.exit_status:
            status, ended_after = beat.exit_status, beat.time
        with contextlib.suppress(OSError, ValueError):
            recorded = json.loads((folder / f"error-{rank}.json").read_text())
            traceback = recorded["message"]["extraInfo"]["py_callstack"]
        killed = rank in self._killed
        return RankExit(rank, process.pid, status, ended_after, beat, traceback, killed)

    def _report(self, exits: list[RankExit], failed_at: float, logs: Path) -> int:
        s = self.settings
        refused = [one for one in exits if one.status == MISCONFIGURED]
        refused.sort(key=lambda one: one.rank not in s.shown)
        cause = refused[0] if refused else root_cause(exits)
        if cause.rank not in s.shown and not cause.traceback:
            # a refused configuration or a fault handler's stack, in a log nobody looks at
            text = (logs / f"rank-{cause.rank}.log").read_text(errors="replace")
            sys.stderr.write("".join(text.splitlines(keepends=True)[-TAIL:]))
        if refused:
            return MISCONFIGURED
        overdue = self._requested_at is not None and len(exits) == len(self._killed)
        say(report(exits, s.ranks, failed_at, s.grace if overdue else None))
        if logs.exists():
            say(f"output of the ranks that were not shown: {logs}")
        return FAILED

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append((signal.Signals(number), time.monotonic()))
        if not self._ranks:  # other machines are waited for
            self._handle_signals()

    def _handle_signals(self) -> None:
        """Ask the ranks to save and leave.

        Raises:
            EndNow: they cannot, or this was asked for before.
        """
        while self._signals:
            number, at = self._signals.pop(0)
            if self._requested_at is None:
                if not self.saves or not self._ranks:
                    raise EndNow(f"{number.name}: ended")
                self._requested_at = at
                say(
                    f"{number.name}: the ranks finish their step and save, {self.settings.grace} s "
                    "at most; a second signal ends them at once"
                )
                for process in self._ranks.values():  # not their loader workers
                    process.send_signal(signal.SIGTERM)
            # a terminal signals the whole group, and what stands between (uv, make, timeout) again
            elif at - self._requested_at >= ONE_REQUEST:
                raise EndNow(f"{number.name} again: ending all ranks; the last checkpoint stays")


def unset(environment: Mapping[str, str], ranks_per_node: int) -> dict[str, str]:
    """What the ranks get beyond the launcher's `environment`, which keeps what it says."""
    # c10d's warnings about peers that left would bury the one report that matters
    wanted = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    if ranks_per_node > 1:
        wanted["OMP_NUM_THREADS"] = "1"
    if not any(name in environment for name in ALLOCATOR):
        # a GPU's memory would else be cut into pieces that fit nothing: 4 of 44 GiB
        wanted[ALLOCATOR[0]] = "expandable_segments:True"
    return {name: value for name, value in wanted.items() if name not in environment}


def say(text: str) -> None:
    """A message of the launcher's own."""
    print(f"torchtitan-flux: {text}", file=sys.stderr, flush=True)


def _kill(process: subprocess.Popen) -> None:
    """A rank and its loader workers."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
