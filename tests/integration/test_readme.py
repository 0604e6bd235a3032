"""The commands of README.md, as they stand, one after another, made short."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from documents import REPO, Command, commands

pytestmark = pytest.mark.slow

DIGITS = (
    "--training.steps", "2", "--training.local_batch_size", "8", "--metrics.log_freq", "1",
    "--validation.steps", "1", "--validation.local_batch_size", "8",
    "--sampling.images_per_prompt", "1", "--sampling.denoising_steps", "2", "--score.count", "10",
    "--score.denoising_steps", "2",
)  # fmt: skip
LATENT = (
    "--model.flavor", "flux-tiny", "--training.img_size", "64", "--training.steps", "2",
    "--encoder.max_t5_encoding_len", "32",
)  # fmt: skip
NOT_HERE = ("pip", "pytest", "python scripts/download_hf_assets.py")
"""CI's, and tests/integration/test_downloads.py's."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("checkout")
    for name in ("run_train.sh", "run_infer.sh", "scripts"):
        (made / name).symlink_to(REPO / name)
    return made


def shell(command: str, folder: Path, *more: str) -> str:
    """What it said; it has to end with 0."""
    python = str(Path(sys.executable).parent)
    ran = subprocess.run(
        ["bash", "-c", " ".join([command, *map(shlex.quote, more)])],
        cwd=folder,
        env={**os.environ, "PATH": f"{python}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ran.returncode == 0, f"{command} {more}\n{ran.stdout}"
    return ran.stdout


def appended(command: Command) -> tuple[str, ...]:
    if command.words[0] == "./run_infer.sh":
        return ("--steps", "2")
    if command.words[0] != "./run_train.sh":
        return ()
    return LATENT if "CONFIG_FILE" in command.environment else DIGITS


def test_the_readme(folder):
    said = {
        c.text: shell(c.text, folder, *appended(c))
        for c in commands("README.md")
        if not c.text.startswith(NOT_HERE)
    }
    first = said["./run_train.sh"]
    assert "validate step:     2" in first
    assert "ema_" in first, "both losses"
    score, grid = first.strip().splitlines()[-2:]
    assert score.startswith("score: ")
    assert (folder / grid.removeprefix("grid: ")).is_file()
    assert (folder / "seven.png").is_file()
    assert "<html" in (folder / "outputs/flux_digits/report.html").read_text(encoding="utf-8")
    assert any("is sound" in text for text in said.values())
    assert (folder / "outputs/two/checkpoint/step-2/manifest.json").is_file()
    assert (folder / "outputs/debug_model").is_dir()
