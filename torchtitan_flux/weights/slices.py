"""A part of one of our parameters, gathered from the foreign tensors that it lies in."""

import torch
from torch import Tensor

from torchtitan_flux.tensor_files.element_types import cast
from torchtitan_flux.tensor_files.sources import Source
from torchtitan_flux.weights.key_maps import Entry

Bounds = list[tuple[int, int]]
"""First index and the one after the last, for each dimension."""


def joined_dtype(entry: Entry, source: Source) -> torch.dtype:
    """Element type of ours: that of its pieces, or where they differ one that holds them all."""
    dtypes = {source.dtypes[name] for name in entry.theirs}
    if len(dtypes) == 1:
        return dtypes.pop()
    return torch.float64 if torch.float64 in dtypes else torch.float32


def read_joined(entry: Entry, source: Source, bounds: Bounds, dtype: torch.dtype) -> Tensor:
    """The part of `entry.join(foreign tensors)` within `bounds`, without building the whole.

    Which foreign index each of ours comes from is found by sending numbers through the map; then
    whatever is contiguous on both sides is copied as one block.
    """
    axis = entry.axis
    out = torch.empty([high - low for low, high in bounds], dtype=dtype)
    if not out.numel():
        return out
    low, high = bounds[axis]
    origin = _origins(entry, [source.shapes[name] for name in entry.theirs])[low:high]
    begin = 0
    for name in entry.theirs:
        size = source.shapes[name][axis]
        here = ((origin >= begin) & (origin < begin + size)).nonzero().flatten()
        if len(here):
            _copy(out, here, origin[here] - begin, name, source, bounds, axis)
        begin += size
    return out


def _copy(
    out: Tensor, ours: Tensor, theirs: Tensor, name: str, source: Source, bounds: Bounds, axis: int
) -> None:
    """Copy indices `theirs` of one foreign tensor to indices `ours` of the result; BeyondRange."""
    first, last = int(theirs.min()), int(theirs.max()) + 1
    box = [slice(low, high) for low, high in bounds]
    box[axis] = slice(first, last)
    part = cast(source.part(name, tuple(box)), out.dtype, name)
    breaks = ((ours.diff() != 1) | (theirs.diff() != 1)).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    for start, end in zip(starts, [*starts[1:], len(ours)], strict=True):
        length = end - start
        out.narrow(axis, int(ours[start]), length).copy_(
            part.narrow(axis, int(theirs[start]) - first, length)
        )
    del part
    source.release(name)


def _origins(entry: Entry, shapes: list[tuple[int, ...]]) -> Tensor:
    """Where along the foreign tensors, laid end to end, each index of ours comes from."""
    probes, begin = [], 0
    for shape in shapes:
        size = shape[entry.axis]
        probe_shape = [1] * len(shape)
        probe_shape[entry.axis] = size
        probes.append(torch.arange(begin, begin + size).view(probe_shape))
        begin += size
    return entry.join(probes).flatten()
