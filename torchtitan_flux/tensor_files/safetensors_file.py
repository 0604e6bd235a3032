"""Reading a safetensors file of somebody else: checked against its own length, then mapped.

The header is read here and not by the safetensors library: every claim in it is compared with the
file before anything is allocated, and a part of a tensor costs the pages it lies on, no more.
"""

import json
import math
import mmap
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtitan_flux.paths import absence
from torchtitan_flux.tensor_files.element_types import DTYPES
from torchtitan_flux.tensor_files.file_kinds import other_kind
from torchtitan_flux.tensor_files.quantized import PACKED

_LENGTH = 8  # bytes of the header's length, little endian
_LONGEST_HEADER = 100_000_000  # the format's own limit
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SAFETENSORS = (".safetensors", ".sft")
"""Suffixes of the format."""
_PAGE = mmap.ALLOCATIONGRANULARITY


class UnreadableWeights(ValueError):
    """Weights that are not what they claim, or of a kind that is not read; says what to do."""


@dataclass(frozen=True)
class _Place:
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the data
    end: int


class TensorsFile:
    """One safetensors file, opened and found consistent.

    Attributes:
        path: where it is.
        dtypes, shapes: of its tensors, by name, in the order of the file.
        metadata: the strings that its header holds beside them.
    """

    def __init__(
        self, path: Path, places: dict[str, _Place], metadata: dict[str, str], data_begin: int
    ) -> None:
        self.path = path
        self.metadata = metadata
        self._places = places
        self._data_begin = data_begin
        self.dtypes = {name: place.dtype for name, place in places.items()}
        self.shapes = {name: place.shape for name, place in places.items()}

    @classmethod
    def open(cls, path: str | Path) -> "TensorsFile":
        """Read the header and check it; the data stay on the disk.

        Raises:
            UnreadableWeights: it is not there, a pickle or another format, or its header and its
                length contradict each other; names the file and, where one is at fault, the tensor.
            OSError: it cannot be opened.
        """
        path = Path(path)
        refuse_pickle(path)
        if not path.is_file():  # a named pipe would be waited for
            what = "is no file" if path.exists() else absence(path)
            raise UnreadableWeights(f"{path} {what}")
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(_LENGTH)
            length = int.from_bytes(begin, "little")
            if len(begin) < _LENGTH or length > min(size - _LENGTH, _LONGEST_HEADER):
                if kind := other_kind(path):
                    raise UnreadableWeights(f"{path} {kind}")
                if len(begin) < _LENGTH:
                    raise UnreadableWeights(
                        f"{path} is too short for a safetensors file ({size} bytes); get it again"
                    )
                raise UnreadableWeights(
                    f"{path} is no safetensors file, or was cut off: its header would have "
                    f"{length} bytes, the file has {size}; get it again"
                )
            header = _parse(path, file.read(length))
        metadata = header.pop("__metadata__", {})
        if not _is_strings(metadata):
            raise UnreadableWeights(f"{path}: __metadata__ in its header is no table of strings")
        places = {name: _place(path, name, entry) for name, entry in header.items()}
        data = size - _LENGTH - length
        _check_cover(path, places, data)
        return cls(path, places, metadata, _LENGTH + length)

    def tensor(self, name: str) -> Tensor:
        """A tensor that lies on the file's pages: whatever is not touched is not read.

        Not to be written to: that ends the process. Copy what is kept, then `release` what was
        read.
        """
        place = self._places[name]
        if place.begin == place.end:
            return torch.empty(place.shape, dtype=place.dtype)
        start = self._data_begin + place.begin
        raw = self._bytes[start : self._data_begin + place.end]
        if start % place.dtype.itemsize:  # a header of odd length: only foreign writers do that
            raw = raw.clone()
        return raw.view(place.dtype).view(place.shape)

    def release(self, name: str) -> None:
        """Let go of the pages of a tensor; they can be read again."""
        place = self._places[name]
        begin = -(-(self._data_begin + place.begin) // _PAGE) * _PAGE
        end = (self._data_begin + place.end) // _PAGE * _PAGE
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    @cached_property
    def _map(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            # a private copy (ACCESS_COPY) would have to fit into memory and swap
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def _bytes(self) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self._map, dtype=torch.uint8)


def refuse_pickle(path: Path) -> None:
    """Raise UnreadableWeights for a file name that stands for a pickle."""
    if path.suffix.lower() in PICKLES:
        raise UnreadableWeights(
            f"{path} is a pickle by its name, and unpickling runs whatever code is in it; give a "
            "safetensors file (where the pickle is trusted: safetensors.torch.save_file writes one)"
        )


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise UnreadableWeights(f"{path}: its header holds {name} twice")
            found[name] = value
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except UnreadableWeights:
        raise
    except (ValueError, RecursionError) as error:
        raise UnreadableWeights(
            f"{path} is no safetensors file: its header is not JSON ({error}); get it again"
        ) from None
    if not isinstance(header, dict):
        raise UnreadableWeights(f"{path} is no safetensors file: its header is no JSON object")
    return header


def _place(path: Path, name: str, entry: Any) -> _Place:
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UnreadableWeights(f"{where} is not described by dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None and entry["dtype"] in PACKED:
        raise UnreadableWeights(
            f"{path} holds weights of 4 or 6 bits (NVFP4, MXFP4 or MXFP6: {name} has type "
            f"{entry['dtype']}), which are not read; give the file that it was made from"
        )
    if dtype is None:
        raise UnreadableWeights(
            f"{where} has the unknown element type {entry['dtype']!r}; known are "
            f"{', '.join(DTYPES)}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_sizes(shape):
        raise UnreadableWeights(f"{where} has no usable shape: {shape!r}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UnreadableWeights(f"{where} has no usable data_offsets: {offsets!r}")
    needed = math.prod(shape) * dtype.itemsize
    if needed != offsets[1] - offsets[0]:
        raise UnreadableWeights(
            f"{where} of shape {tuple(shape)} and type {entry['dtype']} needs {needed} bytes, its "
            f"data_offsets hold {offsets[1] - offsets[0]}"
        )
    return _Place(dtype, tuple(shape), *offsets)


def _check_cover(path: Path, places: dict[str, _Place], data: int) -> None:
    """Tensors must fill the data from its first byte to its last, each byte once."""
    position, before = 0, "the header"
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.end > data:
            raise UnreadableWeights(
                f"{path} was cut off: tensor {name} ends at byte {place.end} of the data, the file "
                f"holds {data}; get it again"
            )
        if place.begin != position:
            fault = "overlaps" if place.begin < position else "leaves a hole after"
            raise UnreadableWeights(
                f"{path}: tensor {name} {fault} {before} (it begins at byte {place.begin} of the "
                f"data, expected is {position})"
            )
        position, before = place.end, name
    if position != data:
        raise UnreadableWeights(
            f"{path} holds {data - position} bytes after its last tensor; it is damaged or no "
            "safetensors file"
        )


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in value
    )


def _is_strings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UnreadableWeights names the file that holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnreadableWeights(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UnreadableWeights(f"{path} holds no JSON object")
    return content


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> name of the file beside the index that holds it.

    Raises:
        UnreadableWeights: it is no such table, or names files elsewhere.
    """
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in table.values()
    ):
        raise UnreadableWeights(f"{index}: its weight_map is no table of file names")
    return table


def listed(names: Iterable[str], shown: int = 8) -> str:
    """Names for a message, cut after the first few."""
    names = list(names)
    more = f" … and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
