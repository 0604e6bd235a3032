"""The commands of the README, through the real launcher: train, train again, draw, score."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

REPO = Path(__file__).resolve().parents[2]
DIGITS = ("--training.steps", "4", "--checkpoint.interval", "2", "--metrics.log_freq", "1",
          "--validation.freq", "2", "--validation.steps", "1", "--sampling.freq", "2",
          "--sampling.images_per_prompt", "1", "--sampling.denoising_steps", "2",
          "--score.count", "20", "--score.denoising_steps", "2",
          "--training.local_batch_size", "16")  # fmt: skip


def run(script: str | Path, *arguments: str, cwd: Path, ranks: int = 1, config: str | None = None):
    """Run a script of the repository as a user would; returns (exit status, output)."""
    environment = {**os.environ, "NGPU": str(ranks), "PYTHON": sys.executable,
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    environment.pop("PYTHONPATH", None)
    if config is not None:
        environment["CONFIG_FILE"] = config
    finished = subprocess.run(
        [str(script), *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return finished.returncode, finished.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """Four steps of the default configuration, started from another folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    status, output = run(
        REPO / "torchtitan/models/flux/run_train.sh", *DIGITS, "--debug.seed", "3", cwd=folder
    )
    assert status == 0, output
    return folder, output


def test_the_default_run_logs_what_it_does_and_ends_with_score_and_grid(trained):
    folder, output = trained
    line = next(line for line in output.splitlines() if "step:     4" in line and "loss" in line)
    for part in ("grad_norm:", "images/s:", "tokens/s:", "TFLOP/s/device:", "memory:", "data wait:",
                 "left:"):  # fmt: skip
        assert part in line
    assert "\x1b[" not in output, "colours belong on a terminal"
    *_, score, grid = output.strip().splitlines()
    assert re.fullmatch(r"score: \d+\.\d % of 20 digits read as prompted", score)
    path = folder / grid.removeprefix("grid: ")
    with Image.open(path) as picture:
        assert picture.text["step"] == "4"  # type: ignore[attr-defined]
        prompts = json.loads(picture.text["prompts"])  # type: ignore[attr-defined]
    assert prompts[7] == "a handwritten seven"
    assert list(folder.glob("outputs/flux_digits/tb/*/events*"))
    assert sorted(p.name for p in folder.glob("outputs/flux_digits/checkpoint/*")) == [
        "step-2",
        "step-4",
    ]


def test_tensorboard_holds_loss_by_time_throughput_and_pictures(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = trained
    (events,) = folder.glob("outputs/flux_digits/tb/*")
    tags = EventAccumulator(str(events)).Reload().Tags()
    assert "samples" in tags["images"]
    assert {
        "loss_metrics/global_avg_loss",
        "validation_metrics/loss",
        "validation_metrics/loss_t=0.0625",
        "throughput/images_per_second",
        "time_metrics/data_wait(%)",
        "lr",
    } <= set(tags["scalars"])


def test_a_finished_run_started_again_prints_its_results(trained):
    folder, first = trained
    status, output = run(REPO / "run_train.sh", *DIGITS, cwd=folder)
    assert status == 0, output
    assert "This run is finished" in output
    assert "loss:" not in output, "nothing is trained"
    assert output.strip().splitlines()[-2:] == first.strip().splitlines()[-2:]


def test_pictures_from_prompts_on_any_number_of_ranks(trained):
    folder, _ = trained
    common = ("--prompt", "three", "--prompt", "a handwritten nine", "--steps", "3", "--cfg", "2",
              "--seed", "11")  # fmt: skip
    for ranks in (1, 2):
        status, output = run(
            REPO / "run_infer.sh", *common, "--out", f"drawn{ranks}", cwd=folder, ranks=ranks
        )
        assert status == 0, output
    for name in ("0000-three.png", "0001-a-handwritten-nine.png"):
        with (
            Image.open(folder / "drawn1" / name) as one,
            Image.open(folder / "drawn2" / name) as two,
        ):
            assert one.size == (8, 8)
            assert one.tobytes() == two.tobytes()
            facts = one.text  # type: ignore[attr-defined]
            assert (facts["seed"], facts["steps"], facts["cfg"]) == ("11", "3", "2.0")
            assert facts["prompt"] in ("three", "a handwritten nine")


@pytest.mark.slow
def test_the_score_script_prints_all_figures(trained):
    folder, _ = trained
    status, output = run(
        Path(sys.executable), str(REPO / "scripts/score_digits.py"), "--count", "20", *DIGITS,
        cwd=folder,
    )  # fmt: skip
    assert status == 0, output
    for part in ("reader on real", "cfg 2:", "cfg 1:", "nearest training", "spread within"):
        assert part in output


def test_a_configuration_that_cannot_run_is_one_report(tmp_path):
    """Status 2, no traceback, nothing written."""
    status, output = run(
        Path(sys.executable),
        *("-m", "torchtitan_flux.train"),
        *("--job.config_file", "train_configs/flux_digits.toml"),
        *("--parallelism.expert_parallel_degree", "2"),
        *("--activation_checkpoint.mode", "memory_budget"),
        *("--encoder.t5_encoder", "assets/nowhere", "--training.global_batch_size", "100"),
        cwd=tmp_path,
    )
    assert status == 2
    for key in ("expert_parallel_degree", "activation_checkpoint.mode", "encoder.t5_encoder",
                "training.global_batch_size"):  # fmt: skip
        assert key in output
    assert "Traceback" not in output
    assert not (tmp_path / "outputs").exists()
