"""What no CPU runs: float8 and compiled steps, offloading, pinned saves, nccl, bfloat16.

    pytest -m cuda          # on a machine with a card; elsewhere everything here is skipped

Programs run as processes of their own: the tests' own process hides the card from forked ranks.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from programs import run_program

CARDS = len(list(Path("/dev").glob("nvidia[0-9]*")))
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not CARDS, reason="no NVIDIA card on this machine"),
]

SMALL = (
    "--job.config_file", "train_configs/debug_model.toml", "--training.steps", "4",
    "--training.img_size", "64", "--training.local_batch_size", "16", "--metrics.log_freq", "1",
    "--lr_scheduler.warmup_steps", "1", "--debug.seed", "1", "--validation.no-enable",
    "--sampling.no-enable", "--checkpoint.no-enable",
)  # fmt: skip


def program(*words: str, ranks: int = 1) -> str:
    """Its output, on the cards as given."""
    given = os.environ["CARDS_AS_GIVEN"]
    visible = None if given == "all" else given
    return run_program(*words, CUDA_VISIBLE_DEVICES=visible, NGPU=str(ranks))


def losses(dump: Path, *more: str, ranks: int = 1) -> dict[int, float]:
    argv = (*SMALL, "--job.dump_folder", str(dump), *more)
    output = program("-m", "torchtitan_flux.launch", "train", *argv, ranks=ranks)
    return {int(s): float(v) for s, v in re.findall(r"step: +(\d+) +loss: +(\S+)", output)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[int, float]:
    found = losses(tmp_path_factory.mktemp("plain"))
    assert len(found) == 4
    return found


MODES = {
    "compiled": ("--compile.enable",),
    "recomputed": ("--activation_checkpoint.mode", "full"),
    "recomputed by operation": (
        "--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option",
        "op",
    ),
    "inputs offloaded": (
        "--activation_checkpoint.mode", "full", "--activation_checkpoint.offload_inputs",
    ),
    "weights offloaded": ("--training.enable_cpu_offload",),
    "accumulated": ("--training.local_batch_size", "8", "--training.global_batch_size", "16"),
    "float32": ("--training.mixed_precision_param", "float32"),
}  # fmt: skip


FLOAT8 = ("--model.converters", "quantize.linear.float8", "--compile.enable")
ROUNDED = {
    "float8": FLOAT8,
    "float8, rowwise": (*FLOAT8, "--quantize.linear.float8.recipe_name", "rowwise"),
    "weights in bfloat16": ("--training.dtype", "bfloat16"),
}


@pytest.mark.parametrize("mode", [*MODES, *ROUNDED])
def test_the_same_losses(plain, tmp_path, mode):
    found = losses(tmp_path, *{**MODES, **ROUNDED}[mode])
    assert found == pytest.approx(plain, rel=0.05 if mode in ROUNDED else 0.02)


@pytest.mark.parametrize("name", ["AdamW8bit", "Adafactor"])
def test_other_optimizers_train(plain, tmp_path, name):
    found = losses(tmp_path, "--optimizer.name", name)
    assert found[1] == pytest.approx(plain[1], rel=1e-3)
    assert found[4] < found[1]


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_a_run_continues(plain, tmp_path, mode):
    more = ("--checkpoint.enable", "--checkpoint.interval", "2", "--checkpoint.async_mode", mode)
    first = losses(tmp_path, *more, "--training.steps", "2", "--lr_scheduler.total_steps", "4")
    second = losses(tmp_path, *more)
    assert {**first, **second} == pytest.approx(plain, rel=0.01)


REPLICATED = ("--parallelism.data_parallel_replicate_degree", "2")
TENSOR = ("--parallelism.tensor_parallel_degree", "2")
CONTEXT = ("--parallelism.context_parallel_degree", "2")
PIPELINE = ("--parallelism.pipeline_parallel_degree", "2")
MESHES = {
    "FSDP 2": (2, 2, ()), "DDP 2": (2, 2, REPLICATED), "TP 2": (2, 1, TENSOR),
    "CP 2": (2, 1, CONTEXT), "PP 2": (2, 1, PIPELINE),
    "HSDP 2x2 x CP 2": (8, 4, (*REPLICATED, *CONTEXT)), "PP 2 x FSDP 4": (8, 4, PIPELINE),
    "FSDP 2 x CP 2 x TP 2": (8, 2, (*CONTEXT, *TENSOR)),
}  # fmt: skip
"""Cards, data ranks, overrides."""


@pytest.mark.parametrize("mesh", MESHES)
def test_several_cards_as_one(plain, tmp_path, mesh):
    cards, shares, more = MESHES[mesh]
    if cards > CARDS:
        pytest.skip(f"needs {cards} cards")
    local = ("--training.local_batch_size", str(16 // shares))
    assert losses(tmp_path, *more, *local, ranks=cards) == pytest.approx(plain, rel=0.02)


PARITY = """
import json
import torch
from helpers import diffusers_forward, model_inputs, relative_l2
from unit.model.test_parity import ARGS, pair
model, theirs = (one.cuda() for one in pair(False, 1.0))
inputs = {n: x.cuda() for n, x in model_inputs(ARGS, 2, 16, 16, 64, seed=2).items()}
found = {}
for dtype in (torch.float32, torch.bfloat16):
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        ours = model.to(dtype)(**inputs)
        found[str(dtype)] = relative_l2(ours, diffusers_forward(theirs.to(dtype), inputs))
print("RESULT", json.dumps(found))
"""


def test_parity_with_diffusers():
    output = program("-c", PARITY)
    found = json.loads(output.rpartition("RESULT ")[2])
    assert found["torch.float32"] < 1e-5
    assert found["torch.bfloat16"] < 1e-2


def test_offloaded_drawing_is_plain_drawing(tmp_path):
    dump = ("--job.dump_folder", str(tmp_path / "run"))
    losses(tmp_path / "run", "--checkpoint.enable")
    for name, more in (("plain", ()), ("low", ("--low_memory",))):
        program(
            "-m", "torchtitan_flux.launch", "infer", "--prompt", "a red circle", "--steps", "4",
            "--out", str(tmp_path / f"{name}.png"), *more,
            "--job.config_file", "train_configs/debug_model.toml", *dump,
        )  # fmt: skip
    plain, low = (np.asarray(Image.open(tmp_path / f"{n}.png"), int) for n in ("plain", "low"))
    assert np.abs(plain - low).max() <= 2, "of 255 levels"
