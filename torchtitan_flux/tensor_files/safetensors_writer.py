"""Writing safetensors tensor by tensor: the header is known beforehand, the values come later.

`safetensors.serialize_file` wants every tensor in memory at once: a gigabyte for a gigabyte.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchtitan_flux.tensor_files.element_types import DTYPES

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Element type and shape of each tensor by its name."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorsWriter:
    """Safetensors files in a folder, filled in any order; every tensor has to come.

    Args:
        folder: where they go; exists.
        files: what each file will hold, by file name.
        metadata: strings for the header of every file.
    """

    def __init__(self, folder: Path, files: Mapping[str, Specs], metadata: Mapping[str, str]):
        self._missing: dict[str, tuple[Path, int, tuple]] = {}
        for file, specs in files.items():
            header: dict[str, object] = {"__metadata__": metadata}
            end = 0
            for name, (dtype, shape) in specs.items():
                begin, end = end, end + total_bytes({name: (dtype, shape)})
                entry = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (begin, end)}
                header[name] = entry
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as the format asks
            (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
            for name, spec in specs.items():
                at = 8 + len(text) + header[name]["data_offsets"][0]  # type: ignore[index]
                self._missing[name] = (folder / file, at, spec)

    def __enter__(self) -> "TensorsWriter":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        assert error is not None or not self._missing, f"not written: {list(self._missing)}"

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its place; OSError where the disk refuses."""
        path, position, spec = self._missing.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == spec, name
        with path.open("r+b") as file:
            file.seek(position)
            file.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))  # type: ignore


def total_bytes(specs: Specs) -> int:
    """Bytes of all values."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values())
