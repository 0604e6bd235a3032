"""A run that goes on with other settings: they hold from its first step, and it says so."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_run import Run, arguments, train
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan_flux.checkpoint.manifest import MANIFEST
from torchtitan_flux.checkpoint.storage import read_states
from torchtitan_flux.training.trainer import FluxTrainer

SHORT = ("--training.steps", "2", "--checkpoint.interval", "2", "--lr_scheduler.warmup_steps", "1")


def run(dump: Path, *more: str, change=None) -> Run:
    return run_ranks(1, train, arguments(dump, 8, *SHORT, *more), change)[0]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    dump = tmp_path_factory.mktemp("two_steps")
    assert run(dump).error == ""
    return dump / "checkpoint/step-2"


def continued(two_steps: Path, dump: Path, *more: str) -> Run:
    """One more step, from the checkpoint."""
    shutil.copytree(two_steps, dump / "checkpoint/step-2")
    return run(dump, "--training.steps", "3", *more)


def given(state: Path):
    """A trainer that has its settings from the start gets weights, moments and position of a state.

    Value by value, and schedules by walking through them: without the code that loads checkpoints.
    """

    def put(target: Tensor, value: Tensor) -> None:
        (target.to_local() if isinstance(target, DTensor) else target).copy_(value)

    def change(trainer: FluxTrainer) -> None:
        values = read_states(state)

        @torch.no_grad()
        def load(step: int = -1) -> bool:
            trainer.optimizers.state_dict()  # creates the moments
            (model,), (optimizer,) = trainer.model_parts, trainer.optimizers.optimizers
            assert isinstance(model, nn.Module)
            for name, parameter in model.named_parameters():
                put(parameter, values[name])
                for moment, value in optimizer.state[parameter].items():
                    put(value, values[f"optimizer.state.{name}.{moment}"])
            for _ in range(2):
                trainer.lr_schedulers.step()
            trainer.dataloader.load_state_dict({"position": 16})
            trainer.step = 2
            return True

        trainer.checkpointer.load = load  # type: ignore[method-assign]

    return change


LINEAR = ("--lr_scheduler.decay_ratio", "0.5", "--lr_scheduler.decay_type", "linear",
          "--lr_scheduler.warmup_steps", "0")  # fmt: skip
CHANGES = {
    "rate": ("--optimizer.lr", "3e-4"),
    "optimizer": ("--optimizer.lr", "3e-4", "--optimizer.beta1", "0.5", "--optimizer.beta2", "0.7",
                  "--optimizer.eps", "1e-5", "--optimizer.weight_decay", "0.5",
                  "--optimizer.implementation", "for-loop", "--optimizer.name", "Adam"),
    "schedule": ("--lr_scheduler.warmup_steps", "0", "--lr_scheduler.decay_ratio", "0.9",
                 "--lr_scheduler.decay_type", "cosine", "--lr_scheduler.total_steps", "6",
                 "--lr_scheduler.min_lr_factor", "0.3"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_the_next_step_is_that_of_a_run_that_had_the_settings_from_the_start(
    two_steps, tmp_path, name
):
    settings = CHANGES[name]
    again = continued(two_steps, tmp_path / "again", *settings)
    reference = run(
        tmp_path / "reference", "--training.steps", "3", *settings, change=given(two_steps)
    )
    assert list(again.losses) == list(reference.losses) == [3]
    assert again.losses == reference.losses
    for name, value in reference.weights.items():
        assert torch.equal(again.weights[name], value), name


def test_what_changed_is_one_line_and_the_rate_is_shown(two_steps, tmp_path):
    changed = ("--optimizer.lr", "3e-4", "--training.max_norm", "inf", *LINEAR)
    again = continued(two_steps, tmp_path, *changed)
    (line,) = [line for line in again.log.splitlines() if line.startswith("From step 3 on:")]
    for part in (
        *("optimizer.lr 0.0008 -> 0.0003", "training.max_norm 2.0 -> inf"),
        *("training.steps 2 -> 3", "lr_scheduler.decay_ratio 0.0 -> 0.5"),
    ):
        assert part in line
    assert "beta1" not in line
    assert "lr: 1.50e-04" in again.log, "half-way down"


def test_a_checkpoint_from_before_settings_were_stored_takes_those_of_now(two_steps, tmp_path):
    old = shutil.copytree(two_steps, tmp_path / "old")
    content = json.loads((old / MANIFEST).read_text())
    del content["settings"]
    (old / MANIFEST).write_text(json.dumps(content))
    again = continued(old, tmp_path / "again", "--optimizer.lr", "3e-4")
    assert "From step" not in again.log
    assert "lr: 3.00e-04" in again.log


def test_a_run_made_longer_goes_on_with_the_longer_schedule(tmp_path):
    """The shorter one's rate would have fallen to nothing after its last step."""

    def rates(steps: int) -> list[str]:
        log = run(tmp_path, *LINEAR, "--training.steps", str(steps)).log
        return [line.split("lr: ")[1].split()[0] for line in log.splitlines() if "lr: " in line]

    assert rates(2) == ["8.00e-04", "8.00e-04"]
    assert rates(4) == ["8.00e-04", "4.00e-04"]
    assert rates(8) == ["8.00e-04", "6.00e-04", "4.00e-04", "2.00e-04"]


LEFT_OUT = {
    "model": "the weights are initialised anew",
    "optimizer": "the optimizer's moments begin at zero",
    "lr_scheduler": "schedule begins again",
    "dataloader": "begin again at position 0",
}


@pytest.fixture(scope="module")
def whole(two_steps, tmp_path_factory) -> Run:
    return continued(two_steps, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("part", LEFT_OUT)
def test_a_part_that_is_left_out_begins_anew_and_it_is_said(two_steps, whole, tmp_path, part):
    again = continued(two_steps, tmp_path, "--checkpoint.exclude_from_loading", part)
    (line,) = [line for line in again.log.splitlines() if "exclude_from_loading" in line]
    assert f"exclude_from_loading: {part}: " in line
    assert LEFT_OUT[part] in line
    same = all(torch.equal(again.weights[name], w) for name, w in whole.weights.items())
    assert same == (part == "lr_scheduler"), "its one step of warm-up has the full rate, too"
    assert (again.losses != whole.losses) == (part in ("model", "dataloader"))
