"""Blocks with the weights of one of them in memory compute what the whole model does."""

from dataclasses import replace

import pytest
import torch
from helpers import model_inputs, nonzero_model

from torchtitan_flux.inference.streaming import ALIGNMENT, Streamed, load_outside
from torchtitan_flux.model import FLAVORS, FluxModel

ARGS = replace(FLAVORS["flux-tiny"], guidance_embed=True, depth=3, depth_single_blocks=2)
BLOCKS = [
    *(f"double_blocks.{i}" for i in range(ARGS.depth)),
    *(f"single_blocks.{i}" for i in range(ARGS.depth_single_blocks)),
]


class Reader:
    """Parameters of a model, and which were asked for."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.values = dict(model.named_parameters())
        self.asked: list[str] = []

    def __call__(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        return self.values[name].detach()


def streamed_model(read: Reader, dtype: torch.dtype) -> tuple[FluxModel, Streamed]:
    with torch.device("meta"):
        model = FluxModel(ARGS)
    load_outside(model, BLOCKS, read, torch.device("cpu"), dtype)
    blocks = {name: model.get_submodule(name) for name in BLOCKS}
    return model, Streamed(blocks, read, torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_streamed_blocks_compute_the_same_bits(dtype):
    whole = nonzero_model(ARGS, seed=2)
    read = Reader(whole)
    model, streamed = streamed_model(read, dtype)
    inputs = model_inputs(ARGS, 2, 3, 5, 7, seed=1)
    # frozen, as where pictures are drawn: torch multiplies otherwise by weights that want gradients
    reference = nonzero_model(ARGS, seed=2).to(dtype).requires_grad_(False)(**inputs)
    assert reference.float().abs().mean() > 0.01
    for _ in range(2):  # blocks come around again at every step
        assert torch.equal(model(**inputs), reference)
    streamed.close()


@torch.no_grad()
def test_nothing_but_one_slot_stays(monkeypatch):
    read = Reader(nonzero_model(ARGS, seed=2))
    model, streamed = streamed_model(read, torch.float32)
    inside = {name for name in read.values if name.startswith(tuple(f"{b}." for b in BLOCKS))}
    assert set(read.asked) == set(read.values) - inside, "blocks are read when they are needed"
    alive = [p for p in model.parameters() if p.device.type != "meta"]
    assert len(alive) == len(read.values) - len(inside)
    seen = []
    model.double_blocks["1"].register_forward_pre_hook(
        lambda *_: seen.append({n for n, p in model.named_parameters() if not p.is_meta} & inside)
    )
    model(**model_inputs(ARGS, 1, 3, 5, 7, seed=1))
    assert {name.split(".")[1] for name in seen[0]} == {"1"}, "the block that computes, alone"
    assert all(p.is_meta for n, p in model.named_parameters() if n in inside)
    streamed.close()
    assert all(p.is_meta for n, p in model.named_parameters() if n in inside)


@torch.no_grad()
def test_parameters_lie_as_in_memory_of_their_own():
    """Kernels choose their way by alignment, and another way may be another last bit."""
    read = Reader(nonzero_model(ARGS, seed=2))
    model, _ = streamed_model(read, torch.bfloat16)
    begins = []
    model.single_blocks["1"].register_forward_pre_hook(
        lambda module, _: begins.extend(p.storage_offset() * 2 for p in module.parameters())
    )
    model(**model_inputs(ARGS, 1, 3, 5, 7, seed=1))
    assert len(begins) > 4
    assert all(begin % ALIGNMENT == 0 for begin in begins)


def test_a_tensor_of_another_shape_is_not_broadcast():
    read = Reader(nonzero_model(ARGS, seed=2))
    read.values["double_blocks.0.img_mod.lin.bias"] = torch.nn.Parameter(torch.ones(1))
    model, _ = streamed_model(read, torch.float32)
    with pytest.raises(AssertionError, match="img_mod"):
        model(**model_inputs(ARGS, 1, 3, 5, 7, seed=1))
