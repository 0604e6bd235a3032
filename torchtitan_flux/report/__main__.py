"""scripts/report.py where only a wheel is installed: python -m torchtitan_flux.report RUN."""

import argparse
import sys
import time
from pathlib import Path

from torchtitan_flux.files import replacing
from torchtitan_flux.report.run import read_run


def main(argv: list[str] | None = None) -> None:
    """Write the page of one run; exit status 2 with one message where that cannot be."""
    parser = argparse.ArgumentParser(
        prog="report.py", description="Write one self-contained HTML page of a run."
    )
    add = parser.add_argument
    add("dump_folder", type=Path, help="job.dump_folder of the run")
    add("--out", type=Path, help="the page (default: report.html in the dump folder)")
    options = parser.parse_args(argv)
    out = options.out or options.dump_folder / "report.html"
    try:
        from torchtitan_flux.report.page import page

        run = read_run(options.dump_folder)
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as unfinished:
            unfinished.write_text(page(run, time.time()), encoding="utf-8")
    except (ImportError, OSError) as error:
        message = str(error)
        if isinstance(error, ImportError):
            message += ': pip install "torchtitan-flux[report]"'
        print(message, file=sys.stderr)
        sys.exit(2)
    for reason in run.missing:
        print(f"note: {reason}")
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
