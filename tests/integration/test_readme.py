"""The commands of README.md as they stand, made short: in a checkout, and from a wheel in an
empty folder."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import REPO, Command, commands
from PIL import Image

pytestmark = pytest.mark.slow

SHORT = (
    "--training.local_batch_size", "8", "--metrics.log_freq", "1", "--validation.steps", "1",
    "--sampling.images_per_prompt", "1", "--sampling.denoising_steps", "2", "--score.count", "10",
    "--score.denoising_steps", "2",
)  # fmt: skip
DIGITS = (*SHORT, "--training.steps", "2", "--validation.local_batch_size", "8")
LATENT = (
    "--model.flavor", "flux-tiny", "--training.img_size", "64", "--training.steps", "2",
    "--encoder.max_t5_encoding_len", "32",
)  # fmt: skip
NOT_HERE = ("pip", "pytest", "python scripts/download_hf_assets.py")
"""CI's, and tests/unit/test_downloads.py's."""


def shell(line: str, folder: Path, *more: str, **environment: str) -> str:
    """The output of a command in bash and more arguments, with the interpreter of the tests; it has
    to end with 0. The package is this repository's unless the environment says otherwise."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    kept |= {"PYTHONPATH": str(REPO), "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}"}
    ran = subprocess.run(
        ["bash", "-c", " ".join([line, *map(shlex.quote, more)])],
        cwd=folder,
        env=kept | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ran.returncode == 0, f"{line}\n{ran.stdout}"
    return ran.stdout


def appended(command: Command) -> tuple[str, ...]:
    if command.words[0] == "./run_infer.sh":
        return ("--steps", "2")
    if command.words[0] != "./run_train.sh":
        return ()
    return LATENT if "CONFIG_FILE" in command.environment else DIGITS


def test_the_readme(tmp_path):
    for name in ("run_train.sh", "run_infer.sh", "scripts"):
        (tmp_path / name).symlink_to(REPO / name)
    outputs = {
        c.text: shell(c.text, tmp_path, *appended(c))
        for c in commands("README.md")
        if not c.text.startswith(NOT_HERE)
    }
    first = outputs["./run_train.sh"]
    assert "validate step:     2" in first
    assert "ema_" in first, "both losses"
    score, grid = first.strip().splitlines()[-2:]
    assert score.startswith("score: ")
    assert (tmp_path / grid.removeprefix("grid: ")).is_file()
    assert (tmp_path / "seven.png").is_file()
    assert "<html" in (tmp_path / "outputs/flux_digits/report.html").read_text(encoding="utf-8")
    assert any("is sound" in text for text in outputs.values())
    assert (tmp_path / "outputs/two/checkpoint/step-2/manifest.json").is_file()
    assert (tmp_path / "outputs/debug_model").is_dir()


def test_a_wheel_from_install_to_report(tmp_path):
    """README, "Without the repository"."""
    site, empty, source = (tmp_path / name for name in ("site", "empty", "source"))
    empty.mkdir()
    # building a wheel writes beside what it is built from
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(REPO / "torchtitan_flux", source / "torchtitan_flux", ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source / name)
    # pip, without the network and beside the environment of the tests
    environment = {
        "PYTHONPATH": str(site), "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_TARGET": str(site), "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }  # fmt: skip
    train = "python -m torchtitan_flux.launch"
    shell("pip wheel --no-deps -w dist .", source, **environment)
    shell("pip install dist/torchtitan_flux-*.whl", source, **environment)
    at = shell("python -c 'import torchtitan_flux as t; print(t.__file__)'", empty, **environment)
    assert Path(at.strip()).is_relative_to(site), "installed, not the tree"
    names = {path.name for path in (REPO / "train_configs").iterdir()}
    assert {path.name for path in (site / "torchtitan_flux/train_configs").iterdir()} == names

    second = ""
    for steps in ("2", "4"):
        second = shell(train, empty, *DIGITS, "--training.steps", steps, **environment)
    assert re.findall(r"step: +(\d+)  loss.*grad_norm", second) == ["3", "4"]
    *_, score, grid = second.strip().splitlines()
    assert re.fullmatch(r"score: \d+\.\d % of 10 digits read as prompted", score)
    shell(f'{train} infer --prompt "a seven" --out seven.png --steps 2', empty, **environment)
    shell("python -m torchtitan_flux.report outputs/flux_digits", empty, **environment)

    with Image.open(empty / grid.removeprefix("grid: ")) as picture:
        assert picture.text["step"] == "4"  # type: ignore[attr-defined]
    with Image.open(empty / "seven.png") as picture:
        assert picture.size == (8, 8)
        assert picture.text["step"] == "4"  # type: ignore[attr-defined]
    assert (empty / "outputs/flux_digits/config.toml").is_file()
    page = (empty / "outputs/flux_digits/report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert sorted(path.name for path in empty.iterdir()) == ["outputs", "seven.png"]
