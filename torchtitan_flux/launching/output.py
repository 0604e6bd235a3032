"""Where the output of each rank goes: the shown ones' to the terminal, the others' to files."""

import os
import tempfile
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs


class RankOutput(LogsSpecs):
    """torchrun asks this where ranks write.

    A shown rank keeps the terminal itself, and with it progress bar and colours. Rank numbers are
    global: with several nodes only the one that has a shown rank prints it.

    Args:
        shown: ranks whose output is shown.
        folder: where a folder for this start is made for the others; a temporary one where it
            cannot be written.
        errors: where torchrun's record of exceptions goes.
    """

    def __init__(self, shown: frozenset[int], folder: Path, errors: Path):
        super().__init__()
        self.shown = shown
        self._folder = folder
        self._errors = errors
        self.hidden_ones_in: Path | None = None
        """Folder with the output of ranks that are not shown, once there are some."""
        self.ranks: list[int] = []
        """Ranks of this node, once they are about to be started."""

    @property
    def root_log_dir(self) -> str:
        return str(self._folder)

    def path(self, rank: int, stream: str) -> Path | None:
        """File with the stream ("out", "err") of a rank, None when it was shown."""
        if rank in self.shown or self.hidden_ones_in is None:
            return None
        return self.hidden_ones_in / f"rank-{rank}.{stream}"

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Files of this node's ranks, by local rank."""
        ranks = {local: int(env["RANK"]) for local, env in envs.items()}
        if set(ranks.values()) - self.shown:
            self.hidden_ones_in = _new_folder(self._folder)
        destinations = LogsDest()
        for local, rank in ranks.items():
            destinations.stdouts[local] = str(self.path(rank, "out") or "")
            destinations.stderrs[local] = str(self.path(rank, "err") or "")
            error_file = str(self._errors / f"error-{rank}.json")
            destinations.error_files[local] = error_file
            envs[local]["TORCHELASTIC_ERROR_FILE"] = error_file
        self.ranks = sorted(ranks.values())
        return destinations


def _new_folder(parent: Path) -> Path:
    """One for this start; nodes that start in the same second share it, rank numbers differ."""
    path = parent / time.strftime("%Y%m%d-%H%M%S")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="torchtitan-flux-"))
    if not os.access(path, os.W_OK):
        return Path(tempfile.mkdtemp(prefix="torchtitan-flux-"))
    return path
