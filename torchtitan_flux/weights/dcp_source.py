"""The weights of a DCP checkpoint, read part by part whatever mesh they were saved from."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from torchtitan_flux.checkpoint.storage import EMA_PREFIX, NOT_MODEL, SafeReader
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.tensor_files.sources import Box, Source


class DcpSource(Source):
    """A checkpoint's weights, or with `average` (a decay of `ema.decay`) their average.

    `average` is "" where there is only one.

    Raises:
        UnreadableWeights: the metadata cannot be read, or name code; or there is no such average.
    """

    def __init__(self, folder: Path, average: str | None = None) -> None:
        self._reader, self._folder = SafeReader(folder), folder
        try:
            metadata = self._reader.read_metadata()
            entries = {
                name: entry
                for name, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            self._reader.set_up_storage_reader(metadata, is_coordinator=False)
        except Exception as error:  # a restricted unpickler meets anything
            raise UnreadableWeights(f"{folder} is no readable DCP checkpoint: {error}") from None
        self._stored = {name: name for name in entries if not name.startswith(NOT_MODEL)}
        if average is not None:
            self._stored |= _average(folder, entries, average)
        self._tensors = {name: entries[stored] for name, stored in self._stored.items()}
        self.dtypes = {name: one.properties.dtype for name, one in self._tensors.items()}
        self.shapes = {name: tuple(one.size) for name, one in self._tensors.items()}

    def part(self, name: str, box: Box) -> Tensor:
        bounds = [one.indices(size)[:2] for one, size in zip(box, self.shapes[name], strict=True)]
        sizes = torch.Size([high - low for low, high in bounds])
        out = torch.empty(sizes, dtype=self.dtypes[name])
        chunk = ChunkStorageMetadata(torch.Size([low for low, _ in bounds]), sizes)
        stored, tensor = self._stored[name], self._tensors[name]
        items = create_read_items_for_chunk_list(stored, tensor, [chunk]) if out.numel() else []
        try:
            self._reader.read_data(LoadPlan(items), _Into(out)).wait()
        except (OSError, RuntimeError, EOFError, AssertionError) as error:
            raise UnreadableWeights(f"{self._folder}: {stored} cannot be read ({error})") from None
        return out


class _Into(LoadPlanner):
    """Reads parts of one tensor."""

    def __init__(self, out: Tensor) -> None:
        self._out = out

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        places = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._out[tuple(slice(begin, begin + length) for begin, length in places)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It lies where it is wanted."""


def _average(folder: Path, entries: Iterable[str], decay: str) -> dict[str, str]:
    """Parameters of an average -> their stored names; what was not trained has none."""
    found: dict[str, dict[str, str]] = {}
    for stored in entries:
        if match := re.fullmatch(rf"{re.escape(EMA_PREFIX)}([\d.e-]+)\.([a-z].*)", stored):
            found.setdefault(match[1], {})[match[2]] = stored
    if decay == "" and len(found) == 1:
        return next(iter(found.values()))
    if decay not in found:
        there = f"it has those of decay {', '.join(found)}" if found else "it has none"
        raise UnreadableWeights(f"{folder}: no average {decay or 'alone'} of the weights; {there}")
    return found[decay]
