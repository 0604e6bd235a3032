"""A pipeline computes what one device computes, draws and measures what it does, and is resized."""

import re
import shutil
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import numpy as np
import pytest
import torch
from helpers import model_inputs
from PIL import Image
from ranks import run_ranks
from tiny_run import GLOBAL_BATCH, Run, arguments, train, worst
from torch import Tensor
from twins import TWIN, Case, assert_as_on_one_device, difference, fill, mutant, reference

from torchtitan_flux.inference.open_run import open_session
from torchtitan_flux.model import FLAVORS, FluxModel
from torchtitan_flux.model.inputs import FluxInputs
from torchtitan_flux.parallel import pipeline_stage
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.parallelize import parallelize_flux
from torchtitan_flux.parallel.pipeline import _Loss, pipeline_flux
from torchtitan_flux.startup.load_config import load_config
from torchtitan_flux.training.losses import forward_backward
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
    "InterleavedZeroBubble 2": Case(pp=2, schedule="InterleavedZeroBubble", ac=("full",)),
    "GPipe 4": Case(pp=4, schedule="GPipe"),
    "1F1B 4": Case(pp=4, guidance=True),
    "Interleaved1F1B 4": Case(pp=4, schedule="Interleaved1F1B", batch=8, **DEEP),
    "InterleavedZeroBubble 4": Case(pp=4, schedule="InterleavedZeroBubble", guidance=True, **DEEP),
    "1F1B 4, parts that the user named": Case(
        pp=4, more=("--parallelism.module_fqns_per_model_part",
                    "img_in,txt_in,time_in,vector_in,double_blocks.0", "double_blocks.1",
                    "single_blocks.0", "single_blocks.1,final_layer")),
    "ZBVZeroBubble 2 x FSDP 2": Case(pp=2, shard=2, schedule="ZBVZeroBubble", ac=("full",)),
    "Interleaved1F1B 2 x FSDP 2": Case(pp=2, shard=2, schedule="Interleaved1F1B"),
    "ZBVZeroBubble 2 x CP 2, uneven": Case(pp=2, cp=2, schedule="ZBVZeroBubble", **UNEVEN),
    "ZBVZeroBubble 2 x TP 2": Case(pp=2, tp=2, schedule="ZBVZeroBubble"),
    "1F1B 2 x FSDP 2 x TP 2": Case(pp=2, shard=2, tp=2, ac=("selective", "op"), guidance=True),
    "1F1B 2 x TP 2 x CP 2": Case(pp=2, tp=2, cp=2, **UNEVEN),
}  # fmt: skip


SLOW = ("Interleaved1F1B 2",)


def marked(name: str):
    if name in LONG:
        return pytest.param(name, marks=pytest.mark.long)
    return pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name


@pytest.mark.parametrize("name", map(marked, {**CASES, **LONG}))
def test_a_pipeline_computes_what_one_device_computes(name):
    assert_as_on_one_device({**CASES, **LONG}[name])


# ---- what the twins see: a pipeline with one thing wrong --------------------------------------


def vec_without_gradient(self, *hidden, img_ids, txt_ids):
    *streams, vec = hidden
    return self.run(streams, vec.detach(), img_ids, txt_ids)


def mean_of_microbatches(self, velocity, target, call=_Loss.__call__):
    return call(self, velocity, target) / 4


def joined_the_other_way(self, img_ids, txt_ids):
    return FluxModel.rotations(self, txt_ids, img_ids)


MUTANTS = {
    "vec's gradient stops at a stage": (
        pipeline_stage.LaterStage, "forward", vec_without_gradient),
    "a loss is divided by the microbatches": (_Loss, "__call__", mean_of_microbatches),
    "later stages turn by other positions": (
        pipeline_stage.LaterStage, "rotations", joined_the_other_way),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_seen(name):
    case = Case(pp=2, guidance=True)
    (twin, _) = run_ranks(2, mutant, case, *MUTANTS[name])
    assert difference(reference(case.alone), twin).grad > 1e-3


# ---- velocities -------------------------------------------------------------------------------

CALLS = ((5, 3, 8, 8), (1, 3, 5, 7), (5, 3, 8, 8), (11, 2, 4, 8))
"""Samples, rows, columns, text tokens: no multiple of the microbatch, and sizes that alternate."""


def velocities(case: Case) -> tuple[list[Tensor], list[float]]:
    """Of a pipeline that trains in between, and how far the loss of a batch is in each case."""
    FLAVORS[TWIN] = case.args
    config = load_config(case.argv())
    dims = FluxParallelDims.of(config.parallelism, case.ranks)
    with torch.device("meta"):
        model = FluxModel(case.args)
    pipeline, stages, *_ = pipeline_flux(
        model, dims, config, torch.device("cpu"), case.args, parallelize_flux
    )
    for stage in stages:
        stage.to_empty(device="cpu")
        fill(stage, dict(case.model().named_parameters()))
    inputs, target = case.data()
    drawn, losses = [], []
    for call in CALLS:
        drawn.append(pipeline(*model_inputs(case.args, *call, seed=3).values()))
        loss = forward_backward(pipeline, FluxInputs(**inputs), target, target.numel(), last=True)
        losses.append(float(loss.sum()))
    return drawn, losses


@pytest.mark.parametrize("case", [
    Case(pp=2, batch=6, pipelined=3, guidance=True),
    pytest.param(Case(pp=2, schedule="Interleaved1F1B"), marks=pytest.mark.long),
    Case(pp=2, shard=2, schedule="ZBVZeroBubble", batch=4, guidance=True),
    pytest.param(Case(pp=2, cp=2, schedule="GPipe"), marks=pytest.mark.long),
    pytest.param(Case(pp=4, schedule="Interleaved1F1B", **DEEP), marks=pytest.mark.long),
], ids=lambda case: case.schedule)  # fmt: skip
def test_every_rank_has_the_velocity_of_any_batch(case):
    model = case.model().requires_grad_(False)
    inputs, target = case.data()
    loss = float((model(**inputs) - target).square().sum() / target.numel())
    for drawn, losses in run_ranks(case.ranks, velocities, case):
        for call, velocity in zip(CALLS, drawn, strict=True):
            expected = model(**model_inputs(case.args, *call, seed=3))
            assert not velocity.requires_grad
            torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5)
        assert losses == pytest.approx([loss] * len(CALLS), rel=1e-5)


# ---- through the trainer ----------------------------------------------------------------------

STEPS = 6
SHORT = (
    "--training.steps", str(STEPS), "--lr_scheduler.warmup_steps", "2",
    "--checkpoint.interval", "3",
    "--validation.freq", "3", "--validation.steps", "1", "--validation.local_batch_size", "6",
    "--sampling.enable", "--sampling.freq", "3", "--sampling.denoising_steps", "2",
    "--sampling.images_per_prompt", "3", "--sampling.prompts", "a red circle",
)  # fmt: skip


def pp(schedule: str, degree: int = 2) -> tuple[str, ...]:
    return ("--parallelism.pipeline_parallel_degree", str(degree),
            "--parallelism.pipeline_parallel_schedule", schedule)  # fmt: skip


def run(ranks: int, dump: Path, local_batch: int, *more: str, change=None) -> Run:
    runs = run_ranks(ranks, train, arguments(dump, local_batch, *SHORT, *more), change)
    assert all(one.losses == runs[0].losses for one in runs), "ranks disagree on the loss"
    assert all(one.error == "" for one in runs)
    return runs[0]


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
    more = ("--validation.local_batch_size", "3", "--parallelism.pipeline_parallel_microbatch_size",
            "2")  # fmt: skip
    return run(4, dump, GLOBAL_BATCH // 2, *pp("1F1B"), *more), dump


def test_a_run_has_the_losses_of_one_rank(one_rank, pipelined):
    """PP 2 x FSDP 2 with validation, a grid and checkpoints."""
    (reference, one_dump), (found, dump) = one_rank, pipelined
    assert found.losses.keys() == reference.losses.keys()
    assert worst(found.losses, reference.losses) <= 1e-5
    assert validated(found) == pytest.approx(validated(reference), abs=2e-5)
    for step in (3, STEPS):
        grids = [
            np.asarray(Image.open(d / f"samples/step-{step}.png"), int) for d in (one_dump, dump)
        ]
        assert np.abs(grids[0] - grids[1]).max() <= 1, "of 255 levels"
    assert "not visible" not in found.log


def opened(dump: Path) -> dict[str, Tensor]:
    """The weights that `infer` and `score` draw with, on ranks that share all of them."""
    argv = arguments(dump, GLOBAL_BATCH // 2, *SHORT, *pp("1F1B"))
    model = open_session(load_config(argv, training=False)).model
    return {name: p.full_tensor() for name, p in model.named_parameters()}


def test_pictures_are_drawn_from_a_pipelines_checkpoint_without_one(pipelined):
    found, dump = pipelined
    for weights in run_ranks(1, opened, dump):
        assert all(torch.equal(weights[name], value) for name, value in found.weights.items())
        assert any("single_blocks" in name for name in weights.keys() - found.weights.keys())


def continued(
    from_dump: Path, dump: Path, ranks: int, local_batch: int, *more: str
) -> dict[int, float]:
    shutil.copytree(from_dump / "checkpoint/step-3", dump / "checkpoint/step-3")
    return run(ranks, dump, local_batch, *more).losses


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_pipeline_is_continued_without_one(one_rank, pipelined, tmp_path, ranks):
    losses = continued(pipelined[1], tmp_path, ranks, GLOBAL_BATCH // ranks)
    assert list(losses) == [4, 5, 6]
    assert worst(losses, one_rank[0].losses) <= 1e-5


@pytest.mark.parametrize(
    "schedule", ["ZBVZeroBubble", pytest.param("Interleaved1F1B", marks=pytest.mark.long)]
)
def test_one_rank_is_continued_in_a_pipeline(one_rank, tmp_path, schedule):
    """Two stages on each rank: the names of two model parts in one checkpoint."""
    losses = continued(one_rank[1], tmp_path, 2, 4, *pp(schedule))
    assert list(losses) == [4, 5, 6]
    assert worst(losses, one_rank[0].losses) <= 1e-5


def broken_sample(trainer: FluxTrainer) -> None:
    """One sample of the second step is not finite."""
    encode = trainer.encoders.encode

    def broken(batch):
        encoded = encode(batch)
        encoded.noise[(batch.position == GLOBAL_BATCH + 3).to(encoded.noise.device)] = torch.nan
        return encoded

    trainer.encoders.encode = broken  # type: ignore[method-assign]


def test_every_rank_knows_which_sample_is_not_finite(tmp_path):
    more = ("--training.steps", "2", "--validation.no-enable", "--sampling.no-enable")
    found = run_ranks(
        2, train, arguments(tmp_path, GLOBAL_BATCH, *SHORT, *pp("1F1B"), *more), broken_sample
    )
    for one in found:
        assert f"the loss is not finite at positions [{GLOBAL_BATCH + 3}]" in one.log
