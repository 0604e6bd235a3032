"""What a safetensors file of an encoder says of its tensors, by the safetensors library."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from torchtitan_flux.tensor_files.element_types import DTYPES
from torchtitan_flux.tensor_files.quantized import QuantizedWeights


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: where it is, its name there, its shape and element type."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and the strings beside them; no values.

    Raises:
        OSError, SafetensorError: it cannot be opened, or is none.
        QuantizedWeights: a tensor has an element type of other kind than floats and integers.
    """
    found = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            tensor = opened.get_slice(name)
            dtype = DTYPES.get(tensor.get_dtype())
            if dtype is None:
                raise QuantizedWeights(
                    f"holds {name} of the type {tensor.get_dtype()}, which is not read"
                )
            found[name] = StoredTensor(file, name, tuple(tensor.get_shape()), dtype)
        return found, opened.metadata() or {}


def read_stored(file: Path, name: str) -> Tensor:
    """A tensor of a safetensors file, in the file's own type."""
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)
