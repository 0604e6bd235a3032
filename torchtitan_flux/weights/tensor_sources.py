"""Where foreign tensors lie: in safetensors files, or in a DCP checkpoint. Read part by part."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from torchtitan_flux.checkpoint.storage import EMA_PREFIX, NOT_MODEL, SafeReader
from torchtitan_flux.tensor_files.safetensors_file import TensorsFile, UnreadableWeights

Box = tuple[slice, ...]


@runtime_checkable
class Source(Protocol):
    """Tensors by their foreign names; `headers` are the strings that files hold beside them."""

    headers: list[dict[str, str]]
    dtypes: dict[str, torch.dtype]
    shapes: dict[str, tuple[int, ...]]

    def part(self, name: str, box: Box) -> Tensor:
        """A part of a tensor: perhaps on the file's own pages, so never to be written to."""
        ...

    def release(self, name: str) -> None:
        """Nothing of this tensor is needed for now."""
        ...


class FilesSource:
    """One or several safetensors files.

    Args:
        files: each tensor in exactly one of them.

    Raises:
        UnreadableWeights: a name is in two files.
    """

    def __init__(self, files: list[TensorsFile]) -> None:
        self._files: dict[str, TensorsFile] = {}
        self.headers = [file.metadata for file in files]
        self.dtypes: dict[str, torch.dtype] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            for name, shape in file.shapes.items():
                if name in self._files:
                    raise UnreadableWeights(
                        f"{name} is both in {self._files[name].path} and in {file.path}"
                    )
                self._files[name] = file
                self.dtypes[name], self.shapes[name] = file.dtypes[name], shape

    def part(self, name: str, box: Box) -> Tensor:
        return self._files[name].tensor(name)[box]

    def release(self, name: str) -> None:
        self._files[name].release(name)


class RenamedSource:
    """Tensors of another source, under other names.

    Args:
        source: what holds them.
        names: new name -> name there; others are left out.
    """

    def __init__(self, source: Source, names: Mapping[str, str]) -> None:
        self._source = source
        self._names = names
        self.headers = source.headers
        self.dtypes = {new: source.dtypes[name] for new, name in names.items()}
        self.shapes = {new: source.shapes[name] for new, name in names.items()}

    def part(self, name: str, box: Box) -> Tensor:
        return self._source.part(self._names[name], box)

    def release(self, name: str) -> None:
        self._source.release(self._names[name])


class DcpSource:
    """The weights of a DCP checkpoint, whatever mesh they were saved from.

    Args:
        folder: the checkpoint.
        average: decay of the average (`ema.decay`) that is read in the weights' place; "" where
            there is only one.

    Raises:
        UnreadableWeights: the metadata cannot be read, or name code; or there is no such average.
    """

    def __init__(self, folder: Path, average: str | None = None) -> None:
        self._reader = SafeReader(folder)
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
        self._folder = folder
        self.headers = []
        self.dtypes = {name: one.properties.dtype for name, one in self._tensors.items()}
        self.shapes = {name: tuple(one.size) for name, one in self._tensors.items()}

    def part(self, name: str, box: Box) -> Tensor:
        shape = self.shapes[name]
        bounds = [one.indices(size)[:2] for one, size in zip(box, shape, strict=True)]
        out: Tensor | None = None
        for number, chunk in enumerate(self._tensors[name].chunks):
            # the part of the box in this chunk, counted from the tensor's first element
            overlap = [
                (max(low, at), min(high, at + size))
                for (low, high), at, size in zip(bounds, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(low >= high for low, high in overlap) and shape:
                continue
            stored = self._chunk(
                MetadataIndex(self._stored[name], chunk.offsets, number), tuple(chunk.sizes)
            )
            wanted = stored[
                tuple(
                    slice(low - at, high - at)
                    for (low, high), at in zip(overlap, chunk.offsets, strict=True)
                )
            ]
            if overlap == bounds:
                return wanted
            if out is None:
                out = torch.empty([high - low for low, high in bounds], dtype=self.dtypes[name])
            out[
                tuple(
                    slice(low - start, high - start)
                    for (low, high), (start, _) in zip(overlap, bounds, strict=True)
                )
            ] = wanted
        if out is None:
            return torch.empty([high - low for low, high in bounds], dtype=self.dtypes[name])
        return out

    def release(self, name: str) -> None:
        """Nothing is kept."""

    def _chunk(self, index: MetadataIndex, shape: tuple[int, ...]) -> Tensor:
        place = self._places[index]
        path = self._folder / place.relative_path
        try:
            with path.open("rb") as file:
                if place.transform_descriptors:
                    raise UnreadableWeights(f"{path} is compressed; save it without extensions")
                file.seek(0, os.SEEK_SET)
                stream = self._reader._slice_file(file, place)
                tensor = torch.load(stream, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise UnreadableWeights(f"{path}: {index.fqn} cannot be read ({error})") from None
        if tuple(tensor.shape) != shape:
            raise UnreadableWeights(
                f"{path}: {index.fqn} has a part of shape {tuple(tensor.shape)}, expected {shape}"
            )
        return tensor


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
