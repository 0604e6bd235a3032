"""The weights of a DCP checkpoint, read part by part whatever mesh they were saved from."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

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
            self._places = metadata.storage_data
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
        out: Tensor | None = None
        for number, chunk in enumerate(self._tensors[name].chunks):
            # the part of the box in this chunk, counted from the tensor's first element
            overlap = [
                (max(low, at), min(high, at + size))
                for (low, high), at, size in zip(bounds, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(low >= high for low, high in overlap):
                continue
            index = MetadataIndex(self._stored[name], chunk.offsets, number)
            stored = self._chunk(index, tuple(chunk.sizes))
            wanted = stored[_box(overlap, chunk.offsets)]
            if overlap == bounds:
                return wanted
            if out is None:
                out = torch.empty([high - low for low, high in bounds], dtype=self.dtypes[name])
            out[_box(overlap, [low for low, _ in bounds])] = wanted
        if out is None:
            return torch.empty([high - low for low, high in bounds], dtype=self.dtypes[name])
        return out

    def _chunk(self, index: MetadataIndex, shape: tuple[int, ...]) -> Tensor:
        place = self._places[index]
        path = self._folder / place.relative_path
        if place.transform_descriptors:
            raise UnreadableWeights(f"{path} is compressed; save it without extensions")
        try:
            with path.open("rb") as file:
                stream = self._reader._slice_file(file, place)
                tensor = torch.load(stream, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise UnreadableWeights(f"{path}: {index.fqn} cannot be read ({error})") from None
        if tuple(tensor.shape) != shape:
            raise UnreadableWeights(
                f"{path}: {index.fqn} has a part of shape {tuple(tensor.shape)}, expected {shape}"
            )
        return tensor


def _box(bounds: Iterable[tuple[int, int]], origin: Iterable[int]) -> Box:
    """Bounds as slices, counted from `origin`."""
    return tuple(slice(low - at, high - at) for (low, high), at in zip(bounds, origin, strict=True))


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
