"""Runs through the launcher, most on eight ranks: losses of one rank, checkpoints, pictures."""

import runpy
from pathlib import Path

import pytest
from programs import pixels
from tiny_run import GLOBAL_BATCH, arguments

from torchtitan_flux.checkpoint.folder import step_folder, verify

REPO = Path(__file__).resolve().parents[2]
_compare = runpy.run_path(str(REPO / "scripts" / "loss_compare.py"))
launch, read_losses, relative = (_compare[n] for n in ("launch", "read_losses", "relative"))
STEPS, HALF = 6, 3
BASE = (
    "--training.steps", str(STEPS), "--lr_scheduler.warmup_steps", "2",
    "--checkpoint.interval", str(HALF), "--checkpoint.no-enable", "--validation.no-enable",
    "--metrics.enable_tensorboard", "--metrics.save_tb_folder", "tb",
)  # fmt: skip


def mesh(*more: str, replicate: int = 1, shard: int = 1, **degrees: int) -> tuple[str, ...]:
    """Overrides for a mesh; each data rank takes its share of the global batch."""
    degrees = {"data_parallel_replicate": replicate, "data_parallel_shard": shard} | {
        f"{name}_parallel": degree for name, degree in degrees.items()
    }
    words = [w for key, n in degrees.items() for w in (f"--parallelism.{key}_degree", str(n))]
    local = GLOBAL_BATCH // (replicate * shard)
    return (*words, "--training.local_batch_size", str(local), *more)


SAVE = ("--checkpoint.enable",)
TO_HALF = (*SAVE, "--training.steps", str(HALF))
VALIDATE = ("--validation.enable", "--validation.freq", str(HALF), "--validation.steps", "1",
            "--validation.local_batch_size", "2")  # fmt: skip
HSDP_CP = mesh(replicate=2, shard=2, context=2)
FSDP_TP = mesh(shard=4, tensor=2)
PIPELINE = mesh("--parallelism.pipeline_parallel_microbatch_size", "1", shard=4, pipeline=2)


TABLE = {
    "HSDP 2x2 x CP 2": [(8, (*HSDP_CP, *VALIDATE, *SAVE))],
    "PP 2 x FSDP 4": [(8, PIPELINE)],
    "FSDP 4 x TP 2": [(8, FSDP_TP)],
    "FSDP 2 x CP 2 x TP 2": [(8, mesh(shard=2, context=2, tensor=2))],
    "saved on FSDP 4 x TP 2, continued on HSDP 2x2 x CP 2": [
        (8, (*FSDP_TP, *TO_HALF)), (8, (*HSDP_CP, *SAVE))],
    "compiled, FSDP 2": [(2, mesh("--compile.enable", shard=2))],
}  # fmt: skip
"""Starts into one dump folder: ranks, overrides."""


def start(command: str, ranks: int, dump: Path, overrides: tuple[str, ...]) -> None:
    words = arguments(dump, GLOBAL_BATCH, *BASE, *overrides)
    status, output = launch(command, ranks, words)
    assert status == 0, output[-5000:]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict[int, float]:
    dump = tmp_path_factory.mktemp("one")
    start("train", 1, dump, ())
    losses = read_losses(dump)
    assert list(losses) == list(range(1, STEPS + 1))
    return losses


SLOW = ("HSDP 2x2 x CP 2", "PP 2 x FSDP 4")


@pytest.mark.parametrize("name", [
    pytest.param(n, marks=pytest.mark.slow if n in SLOW else pytest.mark.long) for n in TABLE
])  # fmt: skip
def test_a_mesh_has_the_losses_of_one_rank(name, one_rank, tmp_path):
    for ranks, overrides in TABLE[name]:
        start("train", ranks, tmp_path, overrides)
    losses = read_losses(tmp_path)
    assert losses.keys() == one_rank.keys()
    tolerance = 1e-4 if "compiled" in name else 1e-5
    assert max(relative(one_rank[s], losses[s]) for s in losses) <= tolerance, losses
    if SAVE[0] in TABLE[name][-1][1]:
        for step in (HALF, STEPS):
            manifest, problem = verify(step_folder(tmp_path / "checkpoint", step))
            assert manifest is not None, problem
        start("infer", 8, tmp_path, (
            "--prompt", "a red circle", "--prompt", "a blue square", "--steps", "2"))  # fmt: skip
        pictures = sorted((tmp_path / "inference_results").glob("*.png"))
        assert len(pictures) == 2
        assert all(len(set(pixels(path))) > 3 for path in pictures), "one of one colour"
