"""A pipeline computes what one device computes, draws and measures what it does, and is resized."""

import re
import shutil
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from tiny_run import GLOBAL_BATCH, Run, arguments, train, trained, worst
from twins import Case, assert_as_on_one_device, assert_mutant_is_seen, tiers

from torchtitan_flux.parallel.pipeline import LaterStage, Pipeline
from torchtitan_flux.training.trainer import FluxTrainer

UNEVEN = {"cols": 5, "text": 7}
DEEP = {"blocks": (3, 5)}
"""For eight stages of one block."""

CASES = {
    "1F1B 2": Case(pp=2, guidance=True),
    "Interleaved1F1B 2": Case(pp=2, schedule="Interleaved1F1B", guidance=True),
    "ZBVZeroBubble 2": Case(pp=2, schedule="ZBVZeroBubble", ac=("selective", "2")),
    "ZBVZeroBubble 4": Case(pp=4, schedule="ZBVZeroBubble", guidance=True, **DEEP),
    "1F1B 2 x FSDP 2, accumulation": Case(pp=2, shard=2, batch=8, microbatches=2),
}  # fmt: skip
LONG = {
    "Interleaved1F1B 2 x CP 2, uneven": Case(pp=2, cp=2, schedule="Interleaved1F1B", **UNEVEN),
    "GPipe 2": Case(pp=2, schedule="GPipe", pipelined=2, ac=("full",)),
    "ZBVZeroBubble 2 x DDP 2, accumulation": Case(
        pp=2, replicate=2, batch=8, microbatches=2, schedule="ZBVZeroBubble"),
    "GPipe 4": Case(pp=4, schedule="GPipe"),
    "Interleaved1F1B 4": Case(pp=4, schedule="Interleaved1F1B", batch=8, **DEEP),
    "ZBVZeroBubble 2 x FSDP 2": Case(pp=2, shard=2, schedule="ZBVZeroBubble", ac=("full",)),
    "Interleaved1F1B 2 x FSDP 2": Case(pp=2, shard=2, schedule="Interleaved1F1B"),
    "ZBVZeroBubble 2 x CP 2, uneven": Case(pp=2, cp=2, schedule="ZBVZeroBubble", **UNEVEN),
    "ZBVZeroBubble 2 x TP 2": Case(pp=2, tp=2, schedule="ZBVZeroBubble"),
    "1F1B 2 x FSDP 2 x TP 2": Case(pp=2, shard=2, tp=2, ac=("selective", "op"), guidance=True),
    "1F1B 2 x TP 2 x CP 2": Case(pp=2, tp=2, cp=2, **UNEVEN),
}  # fmt: skip


@pytest.mark.parametrize("case", tiers(CASES | LONG, ("Interleaved1F1B 2",), tuple(LONG)))
def test_a_pipeline_computes_what_one_device_computes(case):
    assert_as_on_one_device(case)


# ---- what the twins see: a pipeline with one thing wrong --------------------------------------


def vec_without_gradient(self, *hidden, **ids):
    *streams, vec = hidden
    return self.run(streams, vec.detach(), **ids)


def mean_of_microbatches(self, velocity, target, call=Pipeline._microbatch_loss):
    return call(self, velocity, target) / 4


MUTANTS = {
    "vec's gradient stops at a stage": (
        LaterStage, "forward", vec_without_gradient),
    "a loss is divided by the microbatches": (
        Pipeline, "_microbatch_loss", mean_of_microbatches),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_seen(name):
    assert_mutant_is_seen(Case(pp=2, guidance=True), *MUTANTS[name])


# ---- through the trainer ----------------------------------------------------------------------

STEPS = 6
SHORT = (
    "--training.steps", str(STEPS), "--lr_scheduler.warmup_steps", "2",
    "--checkpoint.interval", "3",
    "--validation.freq", "3", "--validation.steps", "1", "--validation.local_batch_size", "6",
    "--sampling.enable", "--sampling.freq", "3", "--sampling.denoising_steps", "2",
    "--sampling.images_per_prompt", "3", "--sampling.prompts", "a red circle",
)  # fmt: skip


def pp(schedule: str) -> tuple[str, ...]:
    return ("--parallelism.pipeline_parallel_degree", "2",
            "--parallelism.pipeline_parallel_schedule", schedule)  # fmt: skip


def run(ranks: int, dump: Path, local_batch: int, *more: str) -> Run:
    return trained(ranks, arguments(dump, local_batch, *SHORT, *more))


def validated(of: Run) -> list[float]:
    return [float(loss) for loss in re.findall(r"validate step: +\d+ +loss: +([\d.]+)", of.log)]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> tuple[Run, Path]:
    dump = tmp_path_factory.mktemp("one")
    found = run(1, dump, GLOBAL_BATCH)
    assert list(found.losses) == list(range(1, STEPS + 1))
    assert len(validated(found)) == 2
    return found, dump


@pytest.fixture(scope="module")
def pipelined(tmp_path_factory) -> tuple[Run, Path]:
    dump = tmp_path_factory.mktemp("pipelined")
    # each data rank validates on three samples, no multiple of the microbatch
    microbatch = ("--parallelism.pipeline_parallel_microbatch_size", "2")
    more = (*pp("1F1B"), *microbatch, "--validation.local_batch_size", "3")
    return run(4, dump, GLOBAL_BATCH // 2, *more), dump


def test_a_run_has_the_losses_of_one_rank(one_rank, pipelined):
    """PP 2 x FSDP 2 with validation, a grid and checkpoints."""
    (reference, one_dump), (found, dump) = one_rank, pipelined
    assert found.losses.keys() == reference.losses.keys()
    assert worst(found.losses, reference.losses) <= 1e-5
    assert validated(found) == pytest.approx(validated(reference), abs=2e-5)
    for name in ("samples/step-3.png", f"samples/step-{STEPS}.png"):
        one, other = (np.asarray(Image.open(folder / name), int) for folder in (one_dump, dump))
        assert np.abs(one - other).max() <= 1, "of 255 levels"
    assert "not visible" not in found.log


@pytest.mark.parametrize(("saved", "ranks", "more"), [
    pytest.param("pipelined", 1, (), id="a pipeline without one"),
    pytest.param("pipelined", 2, (), id="a pipeline on FSDP 2", marks=pytest.mark.long),
    pytest.param("one_rank", 2, pp("ZBVZeroBubble"), id="one rank in a pipeline, two parts each"),
    pytest.param("one_rank", 2, pp("Interleaved1F1B"), id="interleaved", marks=pytest.mark.long),
])  # fmt: skip
def test_a_run_continues_with_a_pipeline_or_without(request, tmp_path, saved, ranks, more):
    expected, _ = request.getfixturevalue("one_rank")
    _, dump = request.getfixturevalue(saved)
    shutil.copytree(dump / "checkpoint/step-3", tmp_path / "checkpoint/step-3")
    local_batch = 4 if more else GLOBAL_BATCH // ranks
    found = run(ranks, tmp_path, local_batch, *more)
    assert list(found.losses) == [4, 5, 6]
    assert worst(found.losses, expected.losses) <= 1e-5
    assert validated(found) == pytest.approx(validated(expected)[1:], abs=2e-5)


def broken_sample(trainer: FluxTrainer) -> None:
    """One sample of the second step is not finite."""
    encode = trainer.encoders.encode

    def broken(batch):
        encoded = encode(batch)
        encoded.noise[(batch.position == GLOBAL_BATCH + 3).to(encoded.noise.device)] = torch.nan
        return encoded

    trainer.encoders.encode = broken  # type: ignore[method-assign]


def test_every_rank_knows_which_sample_is_not_finite(tmp_path):
    argv = arguments(
        tmp_path, GLOBAL_BATCH, "--training.steps", "2", "--validation.no-enable", *pp("1F1B")
    )
    for one in run_ranks(2, train, argv, broken_sample):
        assert f"the loss is not finite at positions [{GLOBAL_BATCH + 3}]" in one.log
