"""A run of weeks must not grow."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "mode"), [(1, "disabled"), (2, "async")])
def test_memory_does_not_grow(ranks, mode):
    """Processes of their own: a forked one inherits the memory of the tests before it."""
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
         "benchmarks/memory.py", "--async-mode", mode],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout
    found = re.findall(r"after step (\d+), .* after step (\d+): ([+-][\d.]+) %", finished.stdout)
    print(finished.stdout[-400:])
    assert len(found) == ranks
    for second, last, growth in found:
        assert int(last) - int(second) >= 300
        assert float(growth) < 3
