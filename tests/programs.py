"""Programs: as processes, or their `main` in this one; how they ended, and their pictures."""

import contextlib
import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from PIL import Image
from ranks import keep_process_group
from torchtitan.tools.logging import logger

REPO = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it said on both streams and in the log."""

    status: int
    text: str


def attempt(main: Callable[[], None], argv: list[str]) -> Said:
    """As its command line would; in a forked rank, for it changes `sys.argv` and the group."""
    keep_process_group()
    sys.argv[1:] = argv
    lines = io.StringIO()
    handler = logging.StreamHandler(lines)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    status = 0
    try:
        with contextlib.redirect_stdout(lines), contextlib.redirect_stderr(lines):
            main()
    except SystemExit as leaving:
        status = leaving.code or 0
    logger.removeHandler(handler)
    return Said(status, lines.getvalue())


def run_program(
    *words: object, cwd: Path = REPO, status: int = 0, **environment: str | None
) -> str:
    """The output of Python with these arguments; it has to end with this status.

    A variable of `environment` that is None is not set.
    """
    variables = {**os.environ, "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}", **environment}
    ran = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={name: value for name, value in variables.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ran.returncode == status, ran.stdout[-8000:]
    return ran.stdout


def pixels(path: Path) -> bytes:
    """What a picture shows, without its metadata."""
    with Image.open(path) as picture:
        return picture.tobytes()
