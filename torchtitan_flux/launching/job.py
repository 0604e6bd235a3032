"""Runs torchrun's own code in this process and turns its end into a report and an exit status."""

import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from torchtitan_flux.launching.joining import NotJoined, join
from torchtitan_flux.launching.output import RankOutput
from torchtitan_flux.launching.rank import LAUNCHER, traceback_path
from torchtitan_flux.launching.settings import Settings
from torchtitan_flux.launching.verdict import DONE, FAILED, MISCONFIGURED, End, judge
from torchtitan_flux.launching.watch import Watch
from torchtitan_flux.training.heartbeat import FOLDER, read_beats

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Variables that set torch's allocator: its newer name, and those of CUDA and ROCm."""

TAIL = 60
"""Lines shown of what a failed rank that is not shown said last."""


@dataclass(frozen=True)
class Job:
    """What every rank runs.

    Args:
        settings: how many ranks, and where.
        module: entry point of a rank.
        arguments: its command line.
        logs: folder for the output of ranks that are not shown.
        saves: whether the ranks save and leave when they are asked to.
        join_timeout: seconds that machines wait for each other.
    """

    settings: Settings
    module: str
    arguments: list[str]
    logs: Path
    saves: bool
    join_timeout: int

    def run(self) -> int:
        """Start the ranks and wait for their end.

        Returns:
            exit status: 0 when every rank left with 0, 2 for a configuration that a rank refused,
            1 for anything else. What happened is said on stderr.
        """
        with tempfile.TemporaryDirectory(prefix="torchtitan-flux-") as name:
            signs = Path(name)
            output = RankOutput(self.settings.shown, self.logs, signs)
            with Watch(signs, output, self.settings.grace, self.saves) as watch:
                try:
                    self._launch(output, signs)
                    return DONE
                except ChildFailedError as error:
                    failed = error
                except NotJoined as error:
                    _say(f"the ranks were not started: {error}")
                    return FAILED
                except Exception as error:
                    _say(f"the ranks were not started: {type(error).__name__}: {error}")
                    return FAILED
            return self._report(failed, watch, output, signs)

    def _launch(self, output: RankOutput, signs: Path) -> None:
        os.environ.update({FOLDER: str(signs), LAUNCHER: str(os.getpid())})
        os.environ.update(unset(os.environ, self.settings.ranks_per_node, sys.platform))
        if "LOGLEVEL" not in os.environ:  # torchrun's own; the report says what it would
            logging.getLogger("torch.distributed.elastic").propagate = False
            logging.getLogger("torch.distributed.elastic").addHandler(logging.NullHandler())
        arguments = [*self._torchrun_arguments(), self.module, *self.arguments]
        config, entry, arguments = config_from_args(parse_args(arguments))
        config.logs_specs = output
        # kept: its server is the one that torchrun meets at
        _store = (
            join(self.settings, float(self.join_timeout), _say) if self.settings.nodes > 1 else None
        )
        elastic_launch(config, entry)(*arguments)

    def _torchrun_arguments(self) -> list[str]:
        s = self.settings
        if s.nodes == 1:
            meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
                       "--rdzv-id", uuid.uuid4().hex, "--local-addr", "localhost"]  # fmt: skip
        elif s.node_rank is None:
            meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", s.endpoint,
                       "--rdzv-id", "torchtitan-flux"]  # fmt: skip
        else:
            meeting = ["--rdzv-backend", "static", "--rdzv-endpoint", s.endpoint,
                       "--rdzv-id", "torchtitan-flux", "--node-rank", str(s.node_rank)]  # fmt: skip
        return [
            *("--nnodes", str(s.nodes), "--nproc-per-node", str(s.ranks_per_node), *meeting),
            # the one name is static's, the other c10d's
            *("--rdzv-conf", f"timeout={self.join_timeout},join_timeout={self.join_timeout}"),
            *("--max-restarts", "0", "--log-dir", os.devnull),
            # the launcher's own watch handles the others
            *("--signals-to-handle", "SIGQUIT"),
            *("-m", "torchtitan_flux.launching.rank"),
        ]

    def _report(
        self, error: ChildFailedError, watch: Watch, output: RankOutput, signs: Path
    ) -> int:
        beats = read_beats(signs)
        ends = [
            End(
                rank,
                failure.pid,
                failure.exitcode,
                beats.get(rank),
                watch.states.get(rank, "?"),
                rank in watch.killed,
                _text(traceback_path(signs, rank)),
            )
            for rank, failure in error.failures.items()
        ]
        first = min(failure.timestamp for failure in error.failures.values())
        verdict = judge(
            ends,
            watch.failed_at or first,
            self.settings.ranks,
            self.settings.grace if watch.overdue else None,
        )
        told = [end for end in ends if end.status == MISCONFIGURED and end.rank in output.shown]
        hidden = output.path(verdict.culprit.rank, "err")
        if hidden is not None and not verdict.culprit.traceback and not told:
            # a refused configuration, a fault handler's stack: said where nobody looks
            sys.stderr.write("".join(_text(hidden).splitlines(keepends=True)[-TAIL:]))
        if verdict.lines:
            _say("\n".join(line for line in verdict.lines if line))
        if verdict.status == FAILED and output.hidden_ones_in is not None:
            _say(f"output of the ranks that were not shown: {output.hidden_ones_in}")
        return verdict.status


def unset(environment: Mapping[str, str], ranks_per_node: int, platform: str) -> dict[str, str]:
    """Variables that the ranks get beyond `environment`, which keeps what it says.

    Args:
        environment: of the launcher.
        ranks_per_node: how many ranks share a machine.
        platform: sys.platform.
    """
    # c10d's warnings about peers that left would bury the one report that matters
    wanted = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    if ranks_per_node > 1:
        wanted["OMP_NUM_THREADS"] = "1"  # torchrun does, in six lines
    if platform == "linux" and not any(name in environment for name in ALLOCATOR):
        # a GPU's memory would else be cut into pieces that fit nothing: 4 of 44 GiB
        wanted[ALLOCATOR[0]] = "expandable_segments:True"
    return {name: value for name, value in wanted.items() if name not in environment}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _say(text: str) -> None:
    print(f"torchtitan-flux: {text}", file=sys.stderr, flush=True)
