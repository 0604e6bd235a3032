"""README, "Without the repository": from a wheel to pictures and a page, in an empty folder."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from documents import REPO
from PIL import Image

SHORT = (
    "--training.local_batch_size", "8", "--metrics.log_freq", "1", "--checkpoint.interval", "100",
    "--validation.steps", "1", "--sampling.images_per_prompt", "1", "--sampling.denoising_steps",
    "2", "--score.count", "10", "--score.denoising_steps", "2",
)  # fmt: skip
"""Appended to the command that trains; without a step count it lasts for minutes."""


def source_tree(folder: Path) -> Path:
    """What a wheel is built from, copied: building writes beside it."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(REPO / "torchtitan_flux", folder / "torchtitan_flux", ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, folder / name)
    return folder


class Stranger:
    """Types the commands of the README into bash, in one folder or another."""

    def __init__(self, site: Path):
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK")}
        python = str(Path(sys.executable).parent)
        self.environment = kept | {
            "PATH": f"{python}:{os.environ['PATH']}",
            "PYTHONPATH": str(site),
            # pip, without the network and beside the environment of the tests
            "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_TARGET": str(site),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }  # fmt: skip

    def begin(self, line: str, cwd: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", f"exec {line}"],
            cwd=cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, line: str, cwd: Path) -> str:
        """What it said; it has to end with 0."""
        process = self.begin(line, cwd)
        output, _ = process.communicate()
        assert process.returncode == 0, f"{line}\n{output}"
        return output

    def stop(self, line: str, cwd: Path, step: int) -> str:
        """Run it until it has trained this step, then SIGTERM; what it said. It ends with 0."""
        process = self.begin(line, cwd)
        assert process.stdout is not None
        said = ""
        for text in process.stdout:
            said += text
            if re.search(rf"step: +{step}  loss", text):
                process.send_signal(signal.SIGTERM)
                break
        said += process.stdout.read()
        assert process.wait() == 0, said
        return said


@pytest.mark.slow
def test_a_wheel_from_install_to_report(tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    stranger, source = Stranger(site), source_tree(tmp_path / "source")
    train = "python -m torchtitan_flux.launch"
    stranger.run("pip wheel --no-deps -w dist .", source)
    stranger.run("pip install dist/torchtitan_flux-*.whl", source)
    at = stranger.run("python -c 'import torchtitan_flux as t; print(t.__file__)'", empty)
    assert Path(at.strip()).is_relative_to(site), "installed, not the tree"
    shipped = site / "torchtitan_flux/train_configs"
    names = {path.name for path in (REPO / "train_configs").iterdir()}
    assert {path.name for path in shipped.iterdir()} == names

    short = " ".join(SHORT)
    first = stranger.stop(f"{train} {short}", empty, step=3)
    (stopped,) = re.findall(r"stopped at step (\d+) and saved; the same command continues", first)
    last = int(stopped) + 2
    second = stranger.run(f"{train} {short} --training.steps {last}", empty)
    steps = [int(step) for step in re.findall(r"step: +(\d+)  loss.*grad_norm", second)]
    assert steps == [int(stopped) + 1, last]
    *_, score, grid = second.strip().splitlines()
    assert re.fullmatch(r"score: \d+\.\d % of 10 digits read as prompted", score)
    stranger.run(f'{train} infer --prompt "a seven" --out seven.png --steps 2', empty)
    stranger.run("python -m torchtitan_flux.report outputs/flux_digits", empty)

    with Image.open(empty / grid.removeprefix("grid: ")) as picture:
        assert picture.text["step"] == str(last)  # type: ignore[attr-defined]
    with Image.open(empty / "seven.png") as picture:
        assert picture.size == (8, 8)
        assert picture.text["step"] == str(last)  # type: ignore[attr-defined]
    assert (empty / "outputs/flux_digits/config.toml").is_file()
    page = (empty / "outputs/flux_digits/report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert sorted(path.name for path in empty.iterdir()) == ["outputs", "seven.png"]
