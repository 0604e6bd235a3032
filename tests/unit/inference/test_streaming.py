"""Blocks with the weights of one of them in memory compute what the whole model does."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
from helpers import model_inputs, nonzero_model

from torchtitan_flux.inference import stages, streaming
from torchtitan_flux.inference.stages import OneAfterAnother
from torchtitan_flux.inference.streaming import (
    ALIGNMENT,
    GRANULE,
    Streamed,
    block_sizes,
    can_be_kept,
    in_pieces,
    load_outside,
    piece_sizes,
)
from torchtitan_flux.model import FLAVORS, FluxModel

ARGS = replace(FLAVORS["flux-tiny"], guidance_embed=True, depth=3, depth_single_blocks=2)
BLOCKS = [
    *(f"double_blocks.{i}" for i in range(ARGS.depth)),
    *(f"single_blocks.{i}" for i in range(ARGS.depth_single_blocks)),
]
EMPTY = torch.empty


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


def pretend_a_card(monkeypatch) -> list[int]:
    """A GPU that is none: two slots and pinned memory of this machine's. Bytes that were pinned."""
    pinned: list[int] = []

    def empty(*shape, device=None, pin_memory=False, **kind):
        on = device if device is not None and torch.device(device).type == "meta" else "cpu"
        found = EMPTY(*shape, device=on, **kind)
        if pin_memory:
            pinned.append(found.nbytes)
        return found

    monkeypatch.setattr(torch, "empty", empty)
    for name in ("Event", "Stream", "stream", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    return pinned


@pytest.mark.parametrize("keep", [True, False])
@torch.no_grad()
def test_blocks_in_pinned_memory_compute_the_same_bits(monkeypatch, keep):
    """Kept, in many pieces, they are read once; else in two places, and read at every use."""
    monkeypatch.setattr(streaming, "GRANULE", 1024)
    whole = nonzero_model(ARGS, seed=2)
    read = Reader(whole)
    with torch.device("meta"):
        model = FluxModel(ARGS)
    load_outside(model, BLOCKS, read, torch.device("cpu"), torch.float32)
    read.asked.clear()
    blocks = {name: model.get_submodule(name) for name in BLOCKS}
    sizes = block_sizes(list(blocks.values()), torch.float32)
    inputs = model_inputs(ARGS, 1, 3, 5, 7, seed=1)
    expected = whole(**inputs)
    pinned = pretend_a_card(monkeypatch)
    streamed = Streamed(blocks, read, torch.device("cuda"), torch.float32, keep)
    for _ in range(2):
        assert torch.equal(model(**inputs), expected)
    streamed.close()
    if keep:
        assert pinned == [piece for size in sizes for piece in piece_sizes(size)]
        assert len(pinned) > 2 * len(sizes)
        assert len(read.asked) == len(set(read.asked))
    else:
        assert pinned == [max(sizes)] * 2
        assert len(read.asked) > len(set(read.asked))


def test_the_first_copy_into_a_slot_waits_for_who_had_its_memory(monkeypatch):
    """An event that was never recorded holds nobody up."""
    order: list[tuple[str, object]] = []

    class Event:
        def record(self, stream):
            order.append(("recorded", self))

    read = Reader(nonzero_model(ARGS, seed=2))
    with torch.device("meta"):
        model = FluxModel(ARGS)
    blocks = {name: model.get_submodule(name) for name in BLOCKS}
    pretend_a_card(monkeypatch)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    stream = MagicMock()
    stream.wait_event.side_effect = lambda event: order.append(("waited for", event))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    streamed = Streamed(blocks, read, torch.device("cuda"), torch.float32, keep=True)
    streamed._enter(0)  # fills both slots
    waits = [event for what, event in order if what == "waited for"]
    assert len(waits) == len(set(waits)) == 2
    for event in waits:
        assert order.index(("recorded", event)) < order.index(("waited for", event))
    streamed.close()


def flux_blocks() -> list[int]:
    """Bytes of each of FLUX.1's blocks in bfloat16."""
    with torch.device("meta"):
        shown = FluxModel(replace(FLAVORS["flux-dev"], depth=1, depth_single_blocks=1))
    double, single = shown.double_blocks["0"], shown.single_blocks["0"]
    return [
        size
        for block, count in ((double, 19), (single, 38))
        for size in block_sizes([block], torch.bfloat16) * count
    ]


def test_pinned_pieces_are_what_the_allocator_gives_and_hardly_more_than_the_blocks():
    """torch's pinned allocator gives the next power of two for every request."""
    sizes = flux_blocks()
    taken = 0
    for size in sizes:
        pieces = piece_sizes(size)
        assert [1 << (piece - 1).bit_length() for piece in pieces] == pieces
        assert 0 <= sum(pieces) - size < GRANULE
        taken += sum(pieces)
    assert round(taken / 2**30) == 22, "docs/inference.md says it"
    assert sum(1 << (size - 1).bit_length() for size in sizes) > 37 * 2**30, "were each asked whole"
    assert can_be_kept(sizes, int(1.26 * taken))
    assert not can_be_kept(sizes, int(1.24 * taken))


@pytest.mark.parametrize("size", [1, GRANULE // 2, 3 * GRANULE + 5])
def test_pieces_hold_the_values_in_their_order(size):
    values = torch.arange(size, dtype=torch.int16)
    pieces = in_pieces(values, pin=False)
    assert torch.equal(torch.cat(pieces), values)
    bytes_ = [piece.untyped_storage().nbytes() for piece in pieces]
    assert bytes_ == piece_sizes(2 * size)


def test_what_is_free_is_looked_at_when_a_part_is_streamed_and_given_back_after(monkeypatch):
    """What the part before had pinned must not stay with torch, or the next has none."""
    free, streamed, emptied = iter([2**30, 2**20]), MagicMock(), MagicMock()
    monkeypatch.setattr(stages, "free_memory", lambda device: next(free))
    monkeypatch.setattr(stages, "Streamed", streamed)
    monkeypatch.setattr(stages, "load_outside", MagicMock())
    monkeypatch.setattr(torch.cuda, "empty_cache", MagicMock())
    monkeypatch.setattr(torch._C, "_host_emptyCache", emptied, raising=False)
    part = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    for turn, kept in enumerate([True, False]):
        model = nonzero_model(ARGS, seed=2)
        blocks = {name: model.get_submodule(name) for name in BLOCKS}
        with OneAfterAnother._streamed(part, model, blocks, MagicMock()):
            assert streamed.call_args.args[-1] is kept
            assert emptied.call_count == turn
        assert emptied.call_count == turn + 1
