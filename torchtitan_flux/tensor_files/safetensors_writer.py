"""Writing safetensors tensor by tensor: the header is known beforehand, the values come later.

`safetensors.serialize_file` wants every tensor in memory at once: a gigabyte for a gigabyte.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchtitan_flux.tensor_files.element_types import DTYPES

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Element type and shape of each tensor by its name."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
