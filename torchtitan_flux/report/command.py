"""Command line of scripts/report.py."""

import argparse
import sys
import time
from pathlib import Path

from torchtitan_flux.report.page import page
from torchtitan_flux.report.read import NotARun, read_run


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
        run = read_run(options.dump_folder)
        write(page(run, time.time()), out)
    except NotARun as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{error.filename or out}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    for reason in run.missing:
        print(f"note: {reason}")
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")


def write(text: str, path: Path) -> None:
    """Put a file in place whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
