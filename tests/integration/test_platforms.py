"""Where there is no triton."""

import os
import re
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
runpy.run_module("torchtitan_flux.train", run_name="__main__", alter_sys=True)
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
