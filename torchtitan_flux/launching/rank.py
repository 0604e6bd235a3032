"""What the launcher starts as every rank: an entry module, tied to the launcher's life.

    python -m torchtitan_flux.launching.rank torchtitan_flux.train --section.key value …

Light until the entry module is imported, so that a rank is bound to its launcher from its first
moment on. SIGTERM and SIGINT are blocked, as the launcher left them, until StopSignals listens.
"""

import os
import runpy
import sys

from torchtitan_flux.lifetime import die_with_parent
from torchtitan_flux.training.heartbeat import Heartbeat

LAUNCHER = "FLUX_LAUNCHER"
"""Environment variable with the launcher's process id."""


def main() -> None:
    """Run the module, and leave word of how it ended."""
    die_with_parent(int(os.environ[LAUNCHER]))
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
    except BaseException as error:  # DCP's CheckpointException is no Exception: @record passes it
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)  # the launcher prints it, once and last
        sys.exit(1)
    finally:
        heartbeat.leave(status)


if __name__ == "__main__":
    main()
