"""What the launcher starts as every rank: an entry module, tied to the launcher's life.

    python -m torchtitan_flux.launching.rank torchtitan_flux.train --section.key value …

Light until the entry module is imported, so that a rank is bound to its launcher from its first
moment on.
"""

import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

from torchtitan_flux.lifetime import die_with_parent
from torchtitan_flux.training.heartbeat import FOLDER, Heartbeat

LAUNCHER = "FLUX_LAUNCHER"
"""Environment variable with the launcher's process id."""


def main() -> None:
    """Run the module, and leave word of how it ended."""
    die_with_parent(int(os.environ[LAUNCHER]))
    # Held back, not ignored: StopSignals lets them in once somebody can act on them.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    heartbeat = Heartbeat()
    heartbeat.beat(0, "starting")
    module, *sys.argv[1:] = sys.argv[1:]
    status = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        raise
    except BaseException:  # DCP's CheckpointException is no Exception
        # The launcher prints it, once and last; here it would be one of many.
        traceback_path(Path(os.environ[FOLDER]), int(os.environ["RANK"])).write_text(
            traceback.format_exc(), encoding="utf-8"
        )
        sys.exit(1)
    finally:
        heartbeat.leave(status)


def traceback_path(folder: Path, rank: int) -> Path:
    """Where a rank leaves the exception that ended it."""
    return folder / f"traceback-{rank}"


if __name__ == "__main__":
    main()
