"""Writing safetensors tensor by tensor: the header is known beforehand, the values come later."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from torchtitan_flux.tensor_files.element_types import DTYPES

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Element type and shape of each tensor by its name, in the order of writing."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class TensorsWriter:
    """Safetensors files in a folder, one or several, filled in order.

    Args:
        folder: where they go; exists.
        name: of the file without its suffix; shards add `-0000X-of-0000Y` and an index.
        specs: what will be written.
        metadata: strings for the header of every file.
        max_bytes: of the tensors of a file; None for a single file. A larger tensor has its own.

    Attributes:
        sha256: checksum of each finished file, by file name.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        specs: Specs,
        metadata: dict[str, str],
        max_bytes: int | None = None,
    ) -> None:
        self.sha256: dict[str, str] = {}
        self._folder, self._name, self._metadata = folder, name, metadata
        groups = _groups(specs, max_bytes)
        count = len(groups)
        suffixes = [f"-{i:05d}-of-{count:05d}" if count > 1 else "" for i in range(1, count + 1)]
        self._shards = [
            (f"{name}{suffix}.safetensors", group)
            for suffix, group in zip(suffixes, groups, strict=True)
        ]
        self._waiting = [(file, dict(group)) for file, group in self._shards]
        self._file = None
        self._hashing = ThreadPoolExecutor(1, "sha256")

    def __enter__(self) -> "TensorsWriter":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            if self._file is not None:
                self._file.close()
            self._hashing.shutdown()

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor.

        Raises:
            AssertionError: it is not the one that is due, or not as announced.
            OSError: it could not be written.
        """
        file_name, due = self._waiting[0]
        if self._file is None:
            self._begin(file_name, due)
        expected, (dtype, shape) = next(iter(due.items()))
        assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, dtype, shape), name
        values = tensor.contiguous().flatten().view(torch.uint8).numpy()
        self._put(memoryview(values))  # type: ignore[arg-type]
        del due[name]
        if not due:
            self._end(file_name)

    def _begin(self, file_name: str, specs: Specs) -> None:
        header: dict[str, object] = {"__metadata__": self._metadata}
        position = 0
        for name, (dtype, shape) in specs.items():
            end = position + dtype.itemsize * math.prod(shape)
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as the format asks
        self._file = (self._folder / file_name).open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._put(memoryview(len(text).to_bytes(8, "little") + text))

    def _put(self, data: memoryview) -> None:
        assert self._file is not None
        hashed = self._hashing.submit(self._digest.update, data)
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        finally:
            hashed.result()

    def _end(self, file_name: str) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self.sha256[file_name] = self._digest.hexdigest()
        self._waiting.pop(0)

    def _finish(self) -> None:
        assert not self._waiting, f"{self._waiting[0][0]} is not complete"
        if len(self._shards) < 2:
            return
        table = {name: file for file, group in self._shards for name in group}
        total = sum(total_bytes(group) for _, group in self._shards)
        content = {"metadata": {"total_size": total}, "weight_map": table}
        index = self._folder / f"{self._name}.safetensors.index.json"
        index.write_text(json.dumps(content, indent=2) + "\n")


def _groups(specs: Specs, max_bytes: int | None) -> list[dict]:
    """Tensors of each file: in order, a new one begins where the next tensor does not fit."""
    groups: list[dict] = [{}]
    filled = 0
    for name, spec in specs.items():
        size = total_bytes({name: spec})
        if max_bytes is not None and groups[-1] and filled + size > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = spec
        filled += size
    return groups


def total_bytes(specs: Specs) -> int:
    """Bytes of all values."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values())


def parse_size(text: str | int) -> int:
    """Bytes of "10GB", "500MB", "2GiB" or a number; ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise ValueError(f"{text!r} is no size; give a number with KB, MB, GB, KiB, MiB or GiB")
    return int(float(found[1]) * unit)
