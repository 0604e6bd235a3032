"""Safetensors files: read where they lie, and written tensor by tensor.

The safetensors library checks the header. Its tensors are not used: they lie on a private mapping,
which has to fit into memory and swap, and whose pages stay until the whole file is closed. Its
`serialize_file` wants every tensor in memory at once.
"""

import json
import math
import mmap
import warnings
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchtitan_flux.paths import absence
from torchtitan_flux.tensor_files.element_types import DTYPES
from torchtitan_flux.tensor_files.file_kinds import PICKLE, PICKLES, other_kind

SAFETENSORS = (".safetensors", ".sft")
"""Suffixes of the format."""


class UnreadableWeights(ValueError):
    """Weights that are not what they claim, or of a kind that is not read; says what to do."""


class TensorsFile:
    """One safetensors file: its tensors' `dtypes` and `shapes` by name, and its `metadata`."""

    def __init__(self, path: Path, header: dict[str, Any], data_begin: int) -> None:
        self.path = path
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.dtypes = {name: _dtype(path, name, entry["dtype"]) for name, entry in header.items()}
        self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        self._places = {
            name: tuple(data_begin + offset for offset in entry["data_offsets"])
            for name, entry in header.items()
        }

    @classmethod
    def open(cls, path: str | Path) -> "TensorsFile":
        """Read the header and check it; the data stay on the disk.

        Raises UnreadableWeights where it is not there, of another format, cut off or damaged.
        """
        path = Path(path)
        refuse_pickle(path)
        if not path.is_file():  # a named pipe would be waited for
            what = "is no file" if path.exists() else absence(path)
            raise UnreadableWeights(f"{path} {what}")
        try:
            with safe_open(path, framework="np"):  # maps it read-only
                pass
        except SafetensorError as error:
            reason = str(error).removeprefix("Error while deserializing header: ")
            kind = other_kind(path) or (
                f"is no safetensors file, or was cut off or damaged ({reason}); get it again"
            )
            raise UnreadableWeights(f"{path} {kind}") from None
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return cls(path, json.loads(file.read(length)), 8 + length)

    def tensor(self, name: str) -> Tensor:
        """A tensor that lies on the file's pages: whatever is not touched is not read.

        Writing to it ends the process. Copy what is kept, then `release` what was read.
        """
        dtype, shape, (begin, end) = self.dtypes[name], self.shapes[name], self._places[name]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        raw = self._bytes[begin:end]
        if begin % dtype.itemsize:  # a header of odd length: only foreign writers do that
            raw = raw.clone()
        return raw.view(dtype).view(shape)

    def release(self, name: str) -> None:
        """Let go of the pages of a tensor; they can be read again."""
        page = mmap.ALLOCATIONGRANULARITY
        begin, end = self._places[name]
        begin, end = -(-begin // page) * page, end // page * page
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    @cached_property
    def _map(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def _bytes(self) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self._map, dtype=torch.uint8)


def _dtype(path: Path, name: str, stored: str) -> torch.dtype:
    if stored not in DTYPES:
        raise UnreadableWeights(
            f"{path}: {name} has element type {stored}; read are {', '.join(DTYPES)}"
        )
    return DTYPES[stored]


def refuse_pickle(path: Path) -> None:
    """Raise UnreadableWeights for a file name that stands for a pickle."""
    if path.suffix.lower() in PICKLES:
        raise UnreadableWeights(f"{path} {PICKLE}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UnreadableWeights names the file that holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnreadableWeights(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UnreadableWeights(f"{path} holds no JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """The inverse of `read_json`, indented as diffusers does."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ---- writing -------------------------------------------------------------------------------

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Element type and shape of each tensor by its name."""


def write_tensors(
    folder: Path,
    files: Mapping[str, Specs],
    metadata: Mapping[str, str],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Safetensors files in a folder that exists; OSError where the disk refuses.

    Args:
        files: what each file will hold, by file name.
        metadata: for the header of every file.
        tensors: all of them, with their names, in any order.
    """
    places: dict[str, tuple[Path, int, tuple]] = {}
    for file, specs in files.items():
        header: dict[str, object] = {"__metadata__": metadata}
        begins, end = {}, 0
        for name, (dtype, shape) in specs.items():
            begins[name], end = end, end + total_bytes({name: (dtype, shape)})
            offsets = (begins[name], end)
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as the format asks
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        for name, begin in begins.items():
            places[name] = folder / file, 8 + len(text) + begin, specs[name]
    for name, tensor in tensors:
        path, position, spec = places.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == spec, name
        with path.open("r+b") as out:
            out.seek(position)
            out.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))  # type: ignore
    assert not places, f"not written: {list(places)}"


def total_bytes(specs: Specs) -> int:
    """Bytes of all values."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values())
