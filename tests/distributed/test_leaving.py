"""What ranks agree on before a step is taken: a stop, a loss that is not finite, bad pictures."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_run import Run, arguments, train, worst

from torchtitan_flux.checkpoint.folder import complete_steps
from torchtitan_flux.data.sources.source import UnreadableItem
from torchtitan_flux.startup.load_config import load_config
from torchtitan_flux.training.trainer import FluxTrainer

SHORT = ("--training.steps", "6", "--checkpoint.interval", "3", "--lr_scheduler.warmup_steps", "2")


def run(ranks: int, dump: Path, change, *more: str) -> list[Run]:
    return run_ranks(ranks, train, arguments(dump, 8 // ranks, *SHORT, *more), change)


def nothing(trainer: FluxTrainer) -> None:
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    return run(2, tmp_path_factory.mktemp("whole"), nothing)[0]


def before_step(step: int, action):
    """Change a trainer so that something happens in a step, before its forward pass."""

    def change(trainer: FluxTrainer) -> None:
        train_step = trainer.train_step

        def changed(iterator):
            if trainer.step == step:
                action(trainer)
            train_step(iterator)

        trainer.train_step = changed  # type: ignore[method-assign]

    return change


def signal_rank_1(trainer: FluxTrainer) -> None:
    if torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        while not trainer._signals.requested:
            pass


def test_a_signal_to_one_rank_stops_all_at_one_step(whole, tmp_path):
    """Saved off the interval, continued on 1 and 4 ranks: the series of the uninterrupted run."""
    one, other = run(2, tmp_path, before_step(4, signal_rank_1))
    assert one.losses.keys() == other.losses.keys() == {1, 2, 3, 4}
    assert one.results == ["stopped at step 4 and saved; the same command continues"]
    assert list(complete_steps(tmp_path / "checkpoint")) == [4, 3]
    for ranks in (1, 4):
        os.system(f"cp -r {tmp_path}/checkpoint {tmp_path}/{ranks}-checkpoint")
        folder = ("--checkpoint.folder", f"{ranks}-checkpoint")
        again = run(ranks, tmp_path, nothing, *folder)[0]
        assert list(again.losses) == [5, 6]
        assert worst(again.losses, whole.losses) <= 1e-5


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_stop_at_an_interval_saves_once(tmp_path, mode):
    ranks = run(2, tmp_path, before_step(3, signal_rank_1), "--checkpoint.async_mode", mode)
    assert ranks[0].results == ["stopped at step 3 and saved; the same command continues"]
    assert ranks[0].log.count(f"Saved {tmp_path}/checkpoint") == 1
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-3"]


def test_a_stop_without_checkpoints_says_that_nothing_was_saved(tmp_path):
    one, _ = run(2, tmp_path, before_step(2, signal_rank_1), "--checkpoint.no-enable")
    assert list(one.losses) == [1, 2]
    assert "nothing was saved" in one.results[0]


def poison(positions: set[int]):
    """Samples at these positions get a loss that is not a number."""

    def change(trainer: FluxTrainer) -> None:
        encode = trainer.encoders.encode

        def poisoned(batch):
            encoded = encode(batch)
            bad = torch.tensor([int(p) in positions for p in batch.position])
            factor = torch.where(bad, torch.nan, 1.0)[:, None, None]
            return replace(encoded, noise=encoded.noise * factor)

        trainer.encoders.encode = poisoned  # type: ignore[method-assign]

    return change


def test_a_step_with_a_bad_loss_is_skipped_by_all_ranks_and_named(whole, tmp_path):
    ranks = run(2, tmp_path, poison({17, 22}))  # step 3; 17 lies on rank 0, 22 on rank 1
    for of_rank in ranks:
        assert of_rank.error == ""
        assert all(value.isfinite().all() for value in of_rank.weights.values())
    losses = ranks[0].losses
    assert [step for step, loss in losses.items() if not abs(loss) < 1e9] == [3]
    assert worst({s: losses[s] for s in (1, 2)}, whole.losses) == 0
    assert abs(losses[4] / whole.losses[4] - 1) > 1e-7, "step 3 was not taken"
    assert "Step 3: the loss is not finite at positions [17, 22]" in ranks[0].log


def test_a_bad_loss_stops_every_rank_where_configured(tmp_path):
    for of_rank in run(2, tmp_path, poison({17}), "--training.nonfinite", "stop"):
        assert "NonFinite: Step 3: the loss is not finite at positions [17]" in of_rank.error
        assert "training.nonfinite" in of_rank.error
    endless = run(1, tmp_path / "2", poison(set(range(99))), "--training.max_nonfinite_steps", "2")
    assert "2 steps in a row" in endless[0].error
    assert list(endless[0].losses) == [1]


def unreadable(share: int):
    """Every `share`-th item of the source cannot be read."""

    def change(trainer: FluxTrainer) -> None:
        samples = trainer.dataloader.samples
        read = samples.source

        class Worn:
            name = "worn"

            def __len__(self):
                return len(read)

            def __getitem__(self, index):
                if index % share == 0:
                    raise UnreadableItem(f"item-{index}", "made so")
                return read[index]

        samples.source = Worn()

    return change


def listed(dump: Path) -> list[dict]:
    return [json.loads(line) for line in (dump / "quarantine.jsonl").read_text().splitlines()]


def test_too_many_unreadable_items_stop_the_run_with_the_list_and_a_checkpoint(tmp_path):
    for of_rank in run(2, tmp_path, unreadable(2), "--data.max_unreadable_share", "0.1"):
        assert "TooManyUnreadable" in of_rank.error
        assert str(tmp_path / "quarantine.jsonl") in of_rank.error
        assert "item-" in of_rank.error
        assert "made so" in of_rank.error
    step = max(of_rank.losses)
    assert step in complete_steps(tmp_path / "checkpoint"), "no work was lost"
    count = len(listed(tmp_path))
    again = run(1, tmp_path, unreadable(2), "--data.max_unreadable_share", "0.9")[0]
    assert max(again.losses) == 6
    names = [entry["item"] for entry in listed(tmp_path)]
    assert len(names) == len(set(names)) > count, "gone on with, each item once"


QUIET = (
    *("--metrics.log_freq", "100", "--checkpoint.interval", "100", "--validation.no-enable"),
    *("--data.max_unreadable_share", "0.9"),
)
"""Nothing in steps 2 to 5 that would have the ranks hear of them at once."""


def late(*changes):
    """As on a GPU: what is agreed on is read one step later."""

    def change(trainer: FluxTrainer) -> None:
        trainer._flags.late = True
        for one in changes:
            one(trainer)

    return change


def test_read_a_step_later_the_run_is_the_same(tmp_path):
    """Bit by bit, with a step that is skipped, the same list, and the same count of it stored."""
    at_once = run(2, tmp_path / "now", lambda t: (poison({17})(t), unreadable(5)(t)), *QUIET)
    later = run(2, tmp_path / "late", late(poison({17}), unreadable(5)), *QUIET)
    for one, other in zip(at_once, later, strict=True):
        assert one.error == other.error == ""
        assert "Step 3: the loss is not finite at positions [17]" in other.log
        for name, weight in one.weights.items():
            assert torch.equal(other.weights[name], weight), name
    assert listed(tmp_path / "late") == listed(tmp_path / "now") != []
    counts = [
        run_ranks(1, stored_count, arguments(tmp_path / dump, 8, *SHORT, *QUIET))
        for dump in ("now", "late")
    ]
    assert counts[0] == counts[1] != [0]


def stored_count(argv: list[str]) -> int:
    """Unreadable items that the newest checkpoint has counted."""
    trainer = FluxTrainer(load_config(argv))
    trainer.checkpointer.load()
    trainer.close()
    return trainer.quarantine.count


def test_read_a_step_later_a_stop_is_one_step_later_on_all_ranks(whole, tmp_path):
    ranks = run(2, tmp_path, late(before_step(3, signal_rank_1)), *QUIET)
    for of_rank in ranks:
        assert of_rank.results == ["stopped at step 4 and saved; the same command continues"]
    again = run(2, tmp_path, late(), *QUIET)
    for name, weight in again[0].weights.items():
        assert torch.equal(weight, whole.weights[name]), name


def test_read_a_step_later_a_bad_loss_ends_the_run_before_anything_is_saved(tmp_path):
    stop = ("--training.nonfinite", "stop", "--checkpoint.interval", "4")
    ranks = run(2, tmp_path, late(poison({17})), *QUIET, *stop)
    for of_rank in ranks:
        assert "NonFinite: Step 3: the loss is not finite at positions [17]" in of_rank.error
    assert list(complete_steps(tmp_path / "checkpoint")) == []
