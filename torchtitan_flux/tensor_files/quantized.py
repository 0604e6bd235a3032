"""Weights stored in fewer bits: scaled float8 is read with its scales, the rest is refused by name.

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

from torchtitan_flux.formatting import listed
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.tensor_files.sources import Box, Source, StateDict

_WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_MARKER = "scaled_fp8"
"""Tensor of ComfyUI's older files that says that there are scales; it holds no value."""
_SCALES = ("scale_weight", "weight_scale")
_WITHOUT_VALUE = ("scale_input", "input_scale", "comfy_quant")
"""Beside a weight: scales of activations, and the format by name."""

_KINDS = {
    "bitsandbytes 4-bit": r"\.quant_state\.bitsandbytes__|\.(nested_)?(absmax|quant_map)$",
    "bitsandbytes int8": r"\.(SCB|weight_format)$",
    "optimum-quanto": r"\.weight\._(data|scale|shift)",
    "torchao": r"[._:](qdata|int_data|scale_and_zero)$",
    "SVDQuant (nunchaku)": r"\.(smooth(_factor)?(_orig)?|w(c|t)?scales?)$",
    "NVFP4": r"\.weight_(scale_2|global_scale)$",
    "packed compressed-tensors": r"\.weight_(packed|zero_point|shape)$",
    "GPTQ or AWQ": r"\.(qweight|qzeros|g_idx|scales)$",
    "HQQ": r"\.W_q$",
    "SDNQ": r"\.(zero_point|svd_up|svd_down)$",
    "smoothed (pre_quant_scale)": r"\.pre_quant_scale$",
    "block-wise float8": r"\.weight_scale_inv$",
    "ModelOpt simulated": r"_quantizer\.",
    "MXFP4": r"_blocks$",
    "codebook (AQLM or VPTQ)": r"\.(codebooks|centroids)",
}
"""Quantisation -> names of the tensors that it leaves beside its codes."""

_METADATA = "_quantization_metadata"
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_PLAIN = ("float32", "fp32", "float16", "fp16", "bfloat16", "bf16")
_HARMLESS = ("format", "full_precision_matrix_mult", "orig_dtype")
"""Entries of a ComfyUI layer's description that change no value."""
_METHODS = ("compressed-tensors", "fbgemm_fp8", "modelopt")
"""`quant_method` of config.json that may stand for scaled float8; the tensors tell."""
_GIVE = "give the file that it was made from, or one in float8 with a scale for each tensor or row"


class QuantizedWeights(UnreadableWeights):
    """Weights whose values cannot be read from the file; says of what kind they are."""


class ScaledSource(Source):
    """Another source without its scales, scaled weights in float32.

    `scales` has the name of the scale of each scaled weight. QuantizedWeights names another
    quantisation, and the scale that is missing, does not fit its weight or is no finite number.
    """

    def __init__(self, source: Source) -> None:
        self._source, self.headers = source, source.headers
        self.scales, beside = _find_scales(source)
        self.shapes = {name: one for name, one in source.shapes.items() if name not in beside}
        self.dtypes = {
            name: torch.float32 if name in self.scales else source.dtypes[name]
            for name in self.shapes
        }

    def part(self, name: str, box: Box) -> Tensor:
        stored = self._source.part(name, box)
        if name not in self.scales:
            return stored
        scale = self._source.whole(self.scales[name])
        return _dequantized(stored, scale, box[0] if box else slice(None), self.scales[name])

    def release(self, name: str) -> None:
        self._source.release(name)


def without_scales(source: Source, where: object) -> ScaledSource:
    """The source with its scales applied; messages begin with `where` they were found."""
    try:
        return ScaledSource(source)
    except QuantizedWeights as error:
        raise QuantizedWeights(f"{where} {error}") from None


def dequantize(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without its scales, scaled weights in float32; or QuantizedWeights."""
    source = ScaledSource(StateDict(tensors))
    return {name: source.whole(name) for name in source.shapes}


def check_config(config: Mapping[str, Any]) -> None:
    """Raise QuantizedWeights where a `config.json` says that its weights are quantised.

    What may be scaled float8 passes: the tensors tell.
    """
    described = config.get("quantization_config")
    if not described:
        return
    described = described if isinstance(described, Mapping) else {}
    method = described.get("quant_method") or described.get("quant_algo") or "an unnamed method"
    if method not in _METHODS:
        bits = [f"{n} bits" for n in (4, 8) if described.get(f"load_in_{n}bit")]
        raise QuantizedWeights(
            f"its quantization_config says that the weights are quantised by "
            f"{', '.join([str(method), *bits])}, which is not read; {_GIVE}"
        )


def _dequantized(part: Tensor, scale: Tensor, rows: slice, name: str) -> Tensor:
    """Values of these rows of a weight; `scale`, of all of it, is one number or one each row."""
    scale = scale.flatten().float()
    if scale.numel() > 1:
        scale = scale[rows].view(-1, *[1] * (part.dim() - 1))
    values = part.to(torch.float32, copy=True).mul_(scale)
    largest = (scale.double() * torch.finfo(part.dtype).max).abs().sum()
    within = largest <= torch.finfo(torch.float32).max  # not where it is NaN
    if not within and not torch.equal(values.isfinite(), part.float().isfinite()):
        raise QuantizedWeights(f"{name} is not finite, or scales its weight beyond float32")
    return values


# ---- what lies beside weights --------------------------------------------------------------


def _find_scales(source: Source) -> tuple[dict[str, str], set[str]]:
    """(weight -> its scale, names that are no weights: scales and descriptions)."""
    dtypes = source.dtypes
    for kind, pattern in _KINDS.items():
        if found := next((name for name in dtypes if re.search(pattern, name)), None):
            raise _refused(kind, found)
    described = _described(source)
    for weight, description in described.items():
        _check_format(weight, description)
    scales: dict[str, str] = {}
    beside = {name for name in dtypes if name.rpartition(".")[2] == _MARKER}
    marked = bool(beside)
    for name in dtypes:
        layer, _, last = name.rpartition(".")
        weight = f"{layer}.weight" if layer else "weight"
        if weight not in dtypes or last not in (*_SCALES, *_WITHOUT_VALUE):
            continue  # a scale of nothing is named by the check of keys
        beside.add(name)
        if last in _SCALES:
            if weight in scales:
                raise QuantizedWeights(f"holds two scales of {weight}: {scales[weight]} and {name}")
            _check_scale(source, weight, name)
            scales[weight] = name
    _check_complete(dtypes, scales, set(described), marked)
    codes = [
        f"{name} ({one})"
        for name, one in dtypes.items()
        if one not in (*_WIDE, *_FLOAT8) and re.search(r"(^|\.)(weight|bias|scale)$", name)
    ]
    if codes:  # named before anything is made of their shapes
        raise _refused("quantised or integer", listed(codes))
    return scales, beside


def _refused(kind: str, example: str) -> QuantizedWeights:
    return QuantizedWeights(f"holds {kind} weights ({example}), which are not read; {_GIVE}")


def _check_scale(source: Source, weight: str, scale: str) -> None:
    stored, of_scale = source.dtypes[weight], source.dtypes[scale]
    if stored not in (*_WIDE, *_FLOAT8):
        raise _refused(f"{str(stored).removeprefix('torch.')} scaled", weight)
    if of_scale not in _WIDE:
        raise _refused(f"MX (block-wise, scales of type {of_scale})", scale)
    shape, found = source.shapes[weight], source.shapes[scale]
    whole = all(size == 1 for size in found)
    by_row = bool(shape) and found in ((shape[0],), (shape[0], *[1] * (len(shape) - 1)))
    if not (whole or by_row):
        raise _refused(f"block-wise scaled (scales {found} of a weight {shape})", scale)


def _check_complete(
    dtypes: Mapping[str, torch.dtype], scales: Mapping[str, str], described: set[str], marked: bool
) -> None:
    """A float8 weight lacks a scale if the same layer of another block has one, or it should."""

    def layer(name: str) -> str:
        return re.sub(r"\d+", "#", name)

    float8 = [name for name, dtype in dtypes.items() if dtype in _FLOAT8]
    scaled = {layer(name) for name in described | (scales.keys() & set(float8))}
    if lost := [name for name in float8 if name not in scales and layer(name) in scaled]:
        raise QuantizedWeights(
            f"is scaled float8, and the scale of {listed(lost, 1)} is missing; get it again"
        )
    if marked and not scales and any(not name.endswith(_MARKER) for name in float8):
        raise QuantizedWeights(
            f"says by {_MARKER} that its float8 weights are scaled, and holds no scales "
            f"({' or '.join(_SCALES)}); get it again"
        )


def _described(source: Source) -> dict[str, Any]:
    """What ComfyUI says of the formats of weights, in headers and beside them.

    A header may also speak of other parts of its file, and with a prefix that is cut off here.
    """
    weights = {name for name in source.dtypes if name.endswith(".weight")}
    found = {}
    for header in source.headers:
        try:
            layers = json.loads(header.get(_METADATA, "{}")).get("layers", {}).items()
        except (ValueError, AttributeError):
            raise QuantizedWeights(f"has a {_METADATA} that is not usable; get it again") from None
        for layer, description in layers:
            parts = f"{layer}.weight".split(".")
            names = (".".join(parts[begin:]) for begin in range(len(parts) - 1))
            if name := next((name for name in names if name in weights), None):
                found[name] = description
    for name in source.dtypes:
        if name.endswith(".comfy_quant"):
            try:
                text = bytes(source.whole(name).flatten().tolist())
                found[f"{name.removesuffix('comfy_quant')}weight"] = json.loads(text)
            except (ValueError, TypeError):  # no bytes, not JSON, not UTF-8
                raise QuantizedWeights(
                    f"holds a {name} that is no description of a format; get it again"
                ) from None
    return found


def _check_format(weight: str, described: Any) -> None:
    if not isinstance(described, Mapping) or "format" not in described:
        raise QuantizedWeights(f"does not say the format of {weight}: {described!r}; get it again")
    if described["format"] not in (*_FORMATS, *_PLAIN):
        raise _refused(f"ComfyUI {described['format']}", weight)
    changed = [name for name, value in described.items() if value and name not in _HARMLESS]
    if changed:
        raise _refused(f"ComfyUI {described['format']} with {', '.join(changed)}", weight)
