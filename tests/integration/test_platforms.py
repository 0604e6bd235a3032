"""Where torchtitan-flux is installed as a wheel, and where there is no triton."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SHORT = (
    "--training.steps", "3", "--training.local_batch_size", "8", "--metrics.log_freq", "1",
    "--validation.no-enable", "--sampling.no-enable", "--score.no-enable",
    "--checkpoint.no-enable", "--metrics.no-enable_tensorboard",
)  # fmt: skip

WITHOUT_TRITON = """
import runpy, sys
from importlib.machinery import PathFinder

class WithoutTriton(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTriton
sys.argv[0] = "trainer"
runpy.run_module("torchtitan_flux.training.trainer", run_name="__main__", alter_sys=True)
assert not [name for name in sys.modules if name.split(".")[0] == "triton"]
"""
"""As on macOS, for which there is no triton."""


def run(*command: object, cwd: Path, **environment: object) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, **{name: str(value) for name, value in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_training_needs_no_triton(tmp_path):
    arguments = ("--job.config_file", "train_configs/flux_digits.toml", *SHORT)
    result = run(sys.executable, "-c", WITHOUT_TRITON, *arguments, cwd=tmp_path, PYTHONPATH=REPO)
    assert result.returncode == 0, result.stdout
    assert re.search(r"step: +3  loss", result.stdout), result.stdout


def source_tree(folder: Path) -> Path:
    """What a wheel is built from, copied: building writes beside it."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(REPO / "torchtitan_flux", folder / "torchtitan_flux", ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, folder / name)
    return folder


@pytest.fixture
def installed(tmp_path) -> Path:
    """The folder that a wheel of the tree was installed into."""
    source, site = source_tree(tmp_path / "source"), tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    built = run(
        *pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source, cwd=tmp_path
    )
    assert built.returncode == 0, built.stdout
    (wheel,) = tmp_path.glob("*.whl")
    put = run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    assert put.returncode == 0, put.stdout
    return site


@pytest.mark.slow
def test_a_wheel_trains_in_an_empty_folder(installed, tmp_path):
    """What is needed is in it: configurations, tiny encoders, prompts."""
    empty = tmp_path / "empty"
    empty.mkdir()
    at = run(
        sys.executable, "-c", "import torchtitan_flux as t; print(t.__file__)",
        cwd=empty, PYTHONPATH=installed,
    )  # fmt: skip
    assert Path(at.stdout.strip()).is_relative_to(installed)
    result = run(
        sys.executable, "-m", "torchtitan_flux.launch", "train", *SHORT,
        cwd=empty, PYTHONPATH=installed,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert re.search(r"step: +3  loss", result.stdout), result.stdout
    assert [path.name for path in empty.iterdir()] == ["outputs"]
    assert (empty / "outputs/flux_digits/config.toml").is_file()
    assert (installed / "torchtitan_flux/assets/prompts.txt").is_file()
    shipped = {path.name for path in (installed / "torchtitan_flux/train_configs").iterdir()}
    assert shipped == {path.name for path in (REPO / "train_configs").iterdir()}
