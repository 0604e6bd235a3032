"""Blocks of a model that are on the device only while they compute.

A block's weights come from where `read` finds them (a file that is mapped, mostly) into one of few
slots of device memory just before the block runs. On a GPU there are two slots: while one block
computes, the next one is copied into the other, out of pinned memory. On the CPU there is one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[str], Tensor]
"""Name of a parameter -> its values, on the CPU, in any element type."""

ALIGNMENT = 256
"""Bytes; each parameter begins at a multiple, as in memory of its own: so kernels do the same."""
GRANULE = 2**21
"""Bytes; pinned memory for a block is a multiple."""
HEADROOM = 1.25
"""CPU memory that must be free to keep all blocks pinned, over what they take."""


@dataclass(frozen=True)
class Block:
    """What a slot has to hold.

    Attributes:
        module: its parameters are on the meta device while it is not in a slot.
        names: of its parameters for `read`, by their names in the module.
        places: first element and shape of each in the slot.
        size: elements of all.
    """

    module: nn.Module
    names: dict[str, str]
    places: dict[str, tuple[int, torch.Size]]
    size: int


class _Slot:
    """Device memory for one block, and on a GPU the pinned memory it is copied from."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.values = torch.empty(size, dtype=dtype, device=device)
        self.block: int | None = None
        if device.type != "cpu":
            self.filled, self.used = torch.cuda.Event(), torch.cuda.Event()
            # the memory may have been another tensor's, which kernels before still use
            self.used.record(torch.cuda.current_stream(device))
            self.staging: Tensor | None = None


class Streamed:
    """Runs the blocks of a model with the weights of one or two of them on the device.

    Calling the model is what it was; blocks must be called in the order given.

    Args:
        blocks: name of each for `read` (`double_blocks.0`) -> module on the meta device.
        read: finds the values.
        device, dtype: where they compute, and in what type.
        keep: on a GPU, keep all blocks in pinned CPU memory, so that they are read once; otherwise
            they are read at every use.
    """

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        read: Read,
        device: torch.device,
        dtype: torch.dtype,
        keep: bool = False,
    ) -> None:
        self._read, self._device, self._dtype, self._keep = read, device, dtype, keep
        self._blocks = [_block(name, module, dtype) for name, module in blocks.items()]
        slots = 1 if device.type == "cpu" else 2
        size = max((block.size for block in self._blocks), default=0)
        self._slots = [_Slot(size, device, dtype) for _ in range(slots)]
        self._current = self._slots[0]
        self._kept: dict[int, list[Tensor]] = {}
        self._copies: Any = None if device.type == "cpu" else torch.cuda.Stream(device)
        self._hooks = [
            hook
            for number, block in enumerate(self._blocks)
            for hook in (
                block.module.register_forward_pre_hook(lambda *_, n=number: self._enter(n)),
                block.module.register_forward_hook(lambda *_, n=number: self._leave(n)),
            )
        ]

    def close(self) -> None:
        """Give the memory back; the blocks are empty from here on."""
        for hook in self._hooks:
            hook.remove()
        if self._copies is not None:
            torch.cuda.synchronize(self._device)
        self._slots.clear()
        self._kept.clear()
        del self._current

    def _enter(self, number: int) -> None:
        slot = next((slot for slot in self._slots if slot.block == number), None)
        if slot is None:
            slot = self._slots[-1] if self._slots[0] is self._current else self._slots[0]
            self._fill(slot, number)
        self._current = slot
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.filled)
        block = self._blocks[number]
        for name, (begin, shape) in block.places.items():
            values = slot.values[begin : begin + shape.numel()].view(shape)
            _put(block.module, name, values)
        if len(self._slots) > 1:
            other = self._slots[1] if slot is self._slots[0] else self._slots[0]
            following = (number + 1) % len(self._blocks)
            if other.block != following:
                self._fill(other, following)

    def _leave(self, number: int) -> None:
        block = self._blocks[number]
        for name, (_, shape) in block.places.items():
            _put(block.module, name, torch.empty(shape, dtype=self._dtype, device="meta"))
        if self._copies is not None:
            self._current.used.record(torch.cuda.current_stream(self._device))

    def _fill(self, slot: _Slot, number: int) -> None:
        slot.block = number
        if self._copies is None:
            self._load(number, slot.values)
            return
        pieces = self._in_pinned_memory(slot, number)
        self._copies.wait_event(slot.used)  # the block before may still compute
        with torch.cuda.stream(self._copies):
            begin = 0
            for piece in pieces:
                part = slot.values[begin : begin + len(piece)]
                part.copy_(piece, non_blocking=True)
                begin += len(piece)
            slot.filled.record(self._copies)

    def _in_pinned_memory(self, slot: _Slot, number: int) -> list[Tensor]:
        size = self._blocks[number].size
        if self._keep:
            if number not in self._kept:
                values = torch.empty(size, dtype=self._dtype)
                self._load(number, values)
                self._kept[number] = in_pieces(values, pin=True)
            return self._kept[number]
        if slot.staging is None:
            most = slot.values.numel()
            slot.staging = torch.empty(most, dtype=self._dtype, pin_memory=True)
        slot.filled.synchronize()  # what was in it may still be on its way
        self._load(number, slot.staging)
        return [slot.staging[:size]]

    def _load(self, number: int, values: Tensor) -> None:
        block = self._blocks[number]
        for name, (begin, shape) in block.places.items():
            found = self._read(block.names[name])
            assert found.shape == shape, block.names[name]
            values[begin : begin + shape.numel()].view(shape).copy_(found)


def in_pieces(values: Tensor, pin: bool) -> list[Tensor]:
    """A copy [n] in memory of `piece_sizes`, pinned or not, the pieces in their order."""
    found, begin = [], 0
    for size in piece_sizes(values.nbytes):
        part = values[begin : begin + size // values.itemsize]
        piece = torch.empty(size // values.itemsize, dtype=values.dtype, pin_memory=pin)
        found.append(piece[: len(part)].copy_(part))
        begin += len(part)
    return found


def piece_sizes(size: int) -> list[int]:
    """Bytes of the allocations that hold so many: powers of two, the largest first.

    Each pinned allocation is rounded up to the next one: of FLUX.1's blocks, 22 GiB, that would
    make 38.
    """
    whole = math.ceil(size / GRANULE) * GRANULE
    return [1 << bit for bit in reversed(range(whole.bit_length())) if whole >> bit & 1]


def can_be_kept(sizes: Sequence[int], free: int) -> bool:
    """Whether so much CPU memory is free that blocks of these bytes can stay in it, pinned."""
    return HEADROOM * sum(sum(piece_sizes(size)) for size in sizes) <= free


def block_sizes(blocks: Sequence[nn.Module], dtype: torch.dtype) -> list[int]:
    """Bytes that each block takes in a slot."""
    return [_block("", block, dtype).size * dtype.itemsize for block in blocks]


@torch.no_grad()
def load_outside(
    model: nn.Module, blocks: Sequence[str], read: Read, device: torch.device, dtype: torch.dtype
) -> None:
    """Give a model on the meta device the parameters that no streamed block has.

    Args:
        model: on the meta device; changed in place.
        blocks: names of the streamed ones.
        read: finds the values by canonical name.
        device, dtype: of the parameters.
    """
    inside = tuple(f"{name}." for name in blocks)
    for name, parameter in list(model.named_parameters()):
        if not name.startswith(inside):
            values = read(name)
            assert values.shape == parameter.shape, name
            _put(model, name, values.to(device, dtype))


def _block(name: str, module: nn.Module, dtype: torch.dtype) -> Block:
    step = ALIGNMENT // dtype.itemsize
    names, places, size = {}, {}, 0
    for own, parameter in module.named_parameters():
        names[own], places[own] = f"{name}.{own}", (size, parameter.shape)
        size += math.ceil(parameter.numel() / step) * step
    return Block(module, names, places, size)


def _put(module: nn.Module, name: str, values: Tensor) -> None:
    *path, own = name.split(".")
    holder = module.get_submodule(".".join(path))
    holder._parameters[own] = nn.Parameter(values, requires_grad=False)
