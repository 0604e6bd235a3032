"""Converting takes the memory of a few tensors, however large the model is."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_memory_stays_below_three_tensors(tmp_path):
    """300 MB of weights, the largest tensor 9 MB: the bound here leaves 60 MB for all else."""
    script = str(ROOT / "benchmarks" / "convert.py")
    options = ["--size", "0.3", "--folder", str(tmp_path), "--slack", "0.06"]
    done = subprocess.run(
        [sys.executable, script, *options, "--to", "diffusers", "dcp"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("within the bound") == 2
    assert list(tmp_path.iterdir()) == [], "the benchmark tidies up"
