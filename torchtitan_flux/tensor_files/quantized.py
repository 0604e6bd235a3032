"""Weights stored in fewer bits: scaled float8 is read with its scales, the rest is refused.

A weight `X.weight` is scaled where `X.scale_weight` (ComfyUI's older files) or `X.weight_scale`
(ComfyUI's newer ones, compressed-tensors, ModelOpt) lies beside it: its value is the product, taken
in float32. One scale serves the whole tensor or one each row. Float8 without scales is a number
like any other.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.tensor_files.sources import Box, Source

_WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_MARKER = "scaled_fp8"
"""Tensor of ComfyUI's older files that says that there are scales; it holds no value."""
_SCALES = ("scale_weight", "weight_scale")
_WITHOUT_VALUE = ("scale_input", "input_scale", "comfy_quant")
"""Beside a weight: scales of activations, and the format by name."""
_OTHERS = re.compile(
    r"\.(nested_)?(absmax|quant_map)$|\.quant_state\.|\.SCB$|\.qweight$|_quantizer\."
    r"|\.(pre_quant_scale|weight_scale_inv|weight_scale_2|weight_global_scale|weight_packed)$"
)
"""Beside weights whose values are not code times scale: bitsandbytes, GPTQ, AWQ, ModelOpt, ..."""

_METADATA = "_quantization_metadata"
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_PLAIN = ("float32", "fp32", "float16", "fp16", "bfloat16", "bf16")
_HARMLESS = ("format", "full_precision_matrix_mult", "orig_dtype")
"""Entries of a ComfyUI layer's description that change no value."""
_METHODS = ("compressed-tensors", "fbgemm_fp8", "modelopt")
"""`quant_method` of config.json that may stand for scaled float8; the tensors tell."""
_GIVE = "give the file that it was made from, or one in float8 with a scale for each tensor or row"


class ScaledSource(Source):
    """Another source without its scales, scaled weights in float32.

    `scales` has the name of the scale of each scaled weight. UnreadableWeights, which begins with
    `where`, names a weight in another quantisation, and the scale that is missing, does not fit its
    weight or is no finite number.
    """

    def __init__(self, source: Source, where: object) -> None:
        self._source, self._where, self.headers = source, where, source.headers
        dtypes = source.dtypes
        for name, dtype in dtypes.items():  # before anything is made of the shapes of codes
            of_weight = re.search(r"(^|\.)(weight|bias|scale)$", name)
            if _OTHERS.search(name) or (of_weight and dtype not in (*_WIDE, *_FLOAT8)):
                raise self._refused(f"{name} of {dtype}")
        beside = {name for name in dtypes if name.rpartition(".")[2] == _MARKER}
        marked = self._says_scaled() or bool(beside)
        self.scales: dict[str, str] = {}
        for name in dtypes:
            layer, _, last = name.rpartition(".")
            weight = f"{layer}.weight" if layer else "weight"
            if weight not in dtypes or last not in (*_SCALES, *_WITHOUT_VALUE):
                continue  # a scale of nothing is named by the check of keys
            beside.add(name)
            if last in _SCALES:
                self._check_scale(weight, name)
                self.scales[weight] = name
        # a float8 weight lacks a scale where the same layer of another block has one
        layers = {re.sub(r"\d+", "#", name) for name in self.scales}
        for name, dtype in dtypes.items():
            if dtype not in _FLOAT8 or name in self.scales or not name.endswith("weight"):
                continue
            if re.sub(r"\d+", "#", name) in layers or (marked and not layers):
                raise UnreadableWeights(
                    f"{where} is scaled float8, and the scale of {name} ({' or '.join(_SCALES)}) "
                    "is missing; get it again"
                )
        self.shapes = {name: one for name, one in source.shapes.items() if name not in beside}
        self.dtypes = {
            name: torch.float32 if name in self.scales else dtypes[name] for name in self.shapes
        }

    def part(self, name: str, box: Box) -> Tensor:
        part = self._source.part(name, box)
        if name not in self.scales:
            return part
        scale = self._source.whole(self.scales[name]).flatten().float()
        if scale.numel() > 1:
            scale = scale[box[0]].view(-1, *[1] * (part.dim() - 1))
        values = part.to(torch.float32, copy=True).mul_(scale)
        finite = values.isfinite()
        if not finite.all() and not torch.equal(finite, part.float().isfinite()):
            raise UnreadableWeights(
                f"{self._where}: {self.scales[name]} is not finite, or scales its weight beyond "
                "float32"
            )
        return values

    def release(self, name: str) -> None:
        self._source.release(name)

    def _refused(self, example: str) -> UnreadableWeights:
        return UnreadableWeights(
            f"{self._where} holds quantised weights ({example}), which are not read; {_GIVE}"
        )

    def _check_scale(self, weight: str, scale: str) -> None:
        if weight in self.scales:
            raise UnreadableWeights(
                f"{self._where} holds two scales of {weight}: {self.scales[weight]} and {scale}"
            )
        shape, found = self._source.shapes[weight], self._source.shapes[scale]
        whole = all(size == 1 for size in found)
        by_row = bool(shape) and found in ((shape[0],), (shape[0], *[1] * (len(shape) - 1)))
        of_scale = self._source.dtypes[scale]
        if of_scale not in _WIDE or not (whole or by_row):
            raise self._refused(f"scales {scale} of {of_scale}, {found} of a weight {shape}")

    def _says_scaled(self) -> bool:
        """Whether ComfyUI's descriptions, in headers and beside weights, speak of float8; all that
        they say is checked."""
        scaled = False
        for layer, text in self._descriptions():
            try:
                described = json.loads(text)
                format = described["format"]
            except (ValueError, TypeError, KeyError):
                raise UnreadableWeights(
                    f"{self._where} has no usable description of the format of {layer}; get it "
                    "again"
                ) from None
            changed = [name for name, one in described.items() if one and name not in _HARMLESS]
            if format not in (*_FORMATS, *_PLAIN) or changed:
                raise self._refused(f"{layer} in ComfyUI's {format} {', '.join(changed)}")
            scaled = scaled or format in _FORMATS
        return scaled

    def _descriptions(self) -> list[tuple[str, str]]:
        """(layer, JSON that describes how it is stored)."""
        found = []
        for header in self.headers:
            try:
                layers = json.loads(header.get(_METADATA, "{}")).get("layers", {}).items()
            except (ValueError, AttributeError):
                raise UnreadableWeights(
                    f"{self._where} has a {_METADATA} that is not usable; get it again"
                ) from None
            found += [(layer, json.dumps(described)) for layer, described in layers]
        for name in self._source.dtypes:
            if name.endswith(".comfy_quant"):
                codes = self._source.whole(name).flatten().to(torch.uint8)
                found.append((name, bytes(codes.tolist()).decode(errors="replace")))
        return found


def check_config(config: Mapping[str, Any]) -> None:
    """Raise UnreadableWeights where a `config.json` says that its weights are quantised.

    What may be scaled float8 passes: the tensors tell.
    """
    described = config.get("quantization_config")
    method = described.get("quant_method") if isinstance(described, Mapping) else None
    if described and method not in _METHODS:
        raise UnreadableWeights(
            f"its quantization_config says that the weights are quantised ({described}), which is "
            f"not read; {_GIVE}"
        )
