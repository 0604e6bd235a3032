"""scripts/loss_compare.py: two meshes agree, two seeds do not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

REPO = Path(__file__).resolve().parents[2]
COMMON = ("--training.local_batch_size", "2", "--metrics.save_tb_folder", "tb")


def compare(cwd: Path, *arguments: str) -> tuple[int, str]:
    """Three steps of the digits through the script; returns (exit status, output)."""
    script = [sys.executable, str(REPO / "scripts/loss_compare.py")]
    config = ["--config", "train_configs/flux_digits.toml", "--steps", "3"]
    finished = subprocess.run(
        [*script, *config, *arguments, "--", *COMMON],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return finished.returncode, finished.stdout


@pytest.mark.slow
def test_one_and_two_ranks_have_the_same_losses(tmp_path):
    status, output = compare(
        tmp_path,
        *("--a", "--training.local_batch_size 4", "--b-ranks", "2", "--plot", "new/plot.png"),
    )
    assert status == 0, output
    rows = re.findall(r"^ +(\d+) +(\d+\.\d{8}) +(\d+\.\d{8}) +(\S+)$", output, re.MULTILINE)
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert all(float(row[3]) <= 1e-5 for row in rows)
    assert "worst: " in output
    with Image.open(tmp_path / "new/plot.png") as picture:
        assert picture.width > 500


@pytest.mark.long
def test_other_seeds_are_told_apart_and_runs_are_kept(tmp_path):
    status, output = compare(
        tmp_path, "--a", "--debug.seed 1", "--b", "--debug.seed 2", "--folder", "kept"
    )
    assert status == 1, output
    assert "above --tolerance" in output
    assert list(tmp_path.glob("kept/b/tb/*/events*"))


def test_what_cannot_run_is_not_compared(tmp_path):
    status, output = compare(tmp_path, "--a", "--model.flavor flux-giant")
    assert status == 2
    assert "model.flavor" in output
    assert "Traceback" not in output
