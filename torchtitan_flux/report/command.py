"""Command line of scripts/report.py."""

import argparse
import sys
import time
from pathlib import Path

from torchtitan_flux.files import replacing
from torchtitan_flux.report.run import NotARun, read_run


def main(argv: list[str] | None = None) -> None:
    """Write the page of one run; exit status 2 with one message where that cannot be."""
    parser = argparse.ArgumentParser(
        prog="report.py", description="Write one self-contained HTML page of a run."
    )
    parser.add_argument("dump_folder", type=Path, help="job.dump_folder of the run")
    parser.add_argument(
        "--out", type=Path, help="the page (default: report.html in the dump folder)"
    )
    options = parser.parse_args(argv)
    out = options.out or options.dump_folder / "report.html"
    try:
        from torchtitan_flux.report.page import page

        run = read_run(options.dump_folder)
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as beside:
            beside.write_text(page(run, time.time()), encoding="utf-8")
    except ImportError as error:
        sys.exit(_refused(f'{error}: pip install "torchtitan-flux[report]"'))
    except NotARun as error:
        sys.exit(_refused(str(error)))
    except OSError as error:
        sys.exit(_refused(f"{error.filename or out}: {error.strerror or error}"))
    for reason in run.missing:
        print(f"note: {reason}")
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")


def _refused(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 2
