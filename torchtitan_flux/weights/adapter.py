"""torchtitan's door to the key maps: our state dict <-> that of diffusers' FluxTransformer2DModel.

torchtitan asks for an adapter wherever its configuration names Hugging Face weights. This project
itself reads and writes such weights without whole tensors (import_weights.py, convert.py); the
adapter serves code that holds a whole state dict.
"""

from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from torchtitan.protocols import BaseStateDictAdapter

from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.tensor_files.quantized import plain
from torchtitan_flux.weights.key_maps import from_diffusers, to_diffusers


class FluxStateDictAdapter(BaseStateDictAdapter):
    """Maps whole state dicts of the transformer; every key is accounted for.

    Args:
        model_args: of the model, with the widths of its encoders.
        hf_assets_path: torchtitan's; nothing is read there.
    """

    fqn_to_index_mapping = None
    """Weights are cut into files by size, not as they were found."""

    def __init__(self, model_args: FluxModelArgs, hf_assets_path: str | None = None):
        self.model_args = model_args
        self.hf_assets_path = hf_assets_path

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """Our layout -> diffusers'. DTensors are gathered whole, which is collective.

        Raises:
            KeyMismatch: names every key that does not fit.
        """
        return to_diffusers(_whole(state_dict), self.model_args)

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """diffusers' layout -> ours. DTensors are gathered whole, which is collective.

        Raises:
            KeyMismatch: names every key that does not fit.
            QuantizedWeights: names a quantisation that is not read; scales are applied.
        """
        return from_diffusers(plain(_whole(hf_state_dict)), self.model_args)

    def get_hf_storage_reader(
        self, path: str, from_quantized: bool = False
    ) -> HuggingFaceStorageReader:
        """DCP's reader of a diffusers folder, a pipeline's or its `transformer/`.

        Raises:
            ValueError: quantized weights are asked for.
        """
        if from_quantized:
            raise ValueError(
                "checkpoint.initial_load_in_hf_quantized = true: of quantised weights only scaled "
                "float8 is read, and without this key"
            )
        folder = Path(path)
        pipeline = (folder / "model_index.json").is_file()
        return HuggingFaceStorageReader(str(folder / "transformer" if pipeline else folder))


def _whole(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in state_dict.items()
    }
