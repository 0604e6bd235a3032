"""scripts/loss_compare.py: two meshes agree."""

import re
from pathlib import Path

import pytest
from PIL import Image
from programs import REPO, run_program


def compare(cwd: Path, status: int, *arguments: str) -> str:
    """Three steps of the digits."""
    return run_program(
        REPO / "scripts/loss_compare.py", "--config", "train_configs/flux_digits.toml",
        "--steps", "3", *arguments, "--", "--training.local_batch_size", "2",
        "--metrics.save_tb_folder", "tb", cwd=cwd, status=status,
    )  # fmt: skip


@pytest.mark.slow
def test_one_and_two_ranks_have_the_same_losses(tmp_path):
    a, b = ("--a", "--training.local_batch_size 4"), ("--b-ranks", "2")
    output = compare(tmp_path, 0, *a, *b, "--plot", "new/plot.png")
    rows = re.findall(r"^ +(\d+) +(\d+\.\d{8}) +(\d+\.\d{8}) +(\S+)$", output, re.MULTILINE)
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert all(float(row[3]) <= 1e-5 for row in rows)
    assert "worst: " in output
    with Image.open(tmp_path / "new/plot.png") as picture:
        assert picture.width > 500


def test_what_cannot_run_is_not_compared(tmp_path):
    output = compare(tmp_path, 2, "--a", "--model.flavor flux-giant")
    assert "model.flavor" in output
    assert "Traceback" not in output
