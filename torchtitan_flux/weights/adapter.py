"""torchtitan's state dict adapter: our state dict <-> diffusers' FluxTransformer2DModel's.

This project itself reads and writes such weights without whole tensors (load.py, convert.py).
"""

from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from torchtitan.protocols import BaseStateDictAdapter

from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.tensor_files.quantized import dequantize
from torchtitan_flux.weights.key_maps import from_diffusers, to_diffusers


class FluxStateDictAdapter(BaseStateDictAdapter):
    """Maps whole state dicts, or raises KeyMismatch; gathers DTensors, which is collective."""

    fqn_to_index_mapping = None  # files are cut by size, not as they were found

    def __init__(self, model_args: FluxModelArgs, hf_assets_path: str | None = None):
        self.model_args = model_args
        self.hf_assets_path = hf_assets_path

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        return to_diffusers(_whole(state_dict), self.model_args)

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """Scales are applied; QuantizedWeights names a quantisation that is not read."""
        return from_diffusers(dequantize(_whole(hf_state_dict)), self.model_args)

    def get_hf_storage_reader(
        self, path: str, from_quantized: bool = False
    ) -> HuggingFaceStorageReader:
        """DCP's reader of a diffusers folder, a pipeline's or its `transformer/`."""
        if from_quantized:
            raise ValueError(
                "checkpoint.initial_load_in_hf_quantized = true: of quantised weights only scaled "
                "float8 is read, and without this key"
            )
        inner = Path(path) / "transformer"
        return HuggingFaceStorageReader(str(inner if inner.is_dir() else path))


def _whole(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in state_dict.items()
    }
