"""Weights stored in fewer bits: scaled float8 is read with its scales, the rest is refused by name.

A weight `X.weight` is scaled where `X.scale_weight` (ComfyUI's older files) or `X.weight_scale`
(ComfyUI's newer ones, compressed-tensors, ModelOpt) lies beside it: its value is the product, taken
in float32. One scale serves the whole tensor or one each row. Float8 without scales is a number
like any other.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (*_WIDE, *_FLOAT8)
"""Element types whose values are the weights."""

PACKED = ("F4", "F6_E2M3", "F6_E3M2")
"""safetensors' names of element types that are no whole bytes."""

MARKER = "scaled_fp8"
"""Tensor of ComfyUI's older files that says that there are scales; it holds no value."""

_SCALES = ("scale_weight", "weight_scale")
_WITHOUT_VALUE = ("scale_input", "input_scale", "comfy_quant")
"""Beside a weight: scales of activations, and the format by name."""

_KINDS = (
    ("bitsandbytes 4-bit", r"\.quant_state\.bitsandbytes__|\.(nested_)?(absmax|quant_map)$"),
    ("bitsandbytes int8", r"\.(SCB|weight_format)$"),
    ("optimum-quanto", r"\.weight\._(data|scale|shift)"),
    ("torchao", r"[._:](qdata|int_data|scale_and_zero)$"),
    ("SVDQuant (nunchaku)", r"\.(smooth(_factor)?(_orig)?|w(c|t)?scales?)$"),
    ("NVFP4", r"\.weight_(scale_2|global_scale)$"),
    ("packed compressed-tensors", r"\.weight_(packed|zero_point|shape)$"),
    ("GPTQ or AWQ", r"\.(qweight|qzeros|g_idx|scales)$"),
    ("HQQ", r"\.W_q$"),
    ("SDNQ", r"\.(zero_point|svd_up|svd_down)$"),
    ("smoothed (pre_quant_scale)", r"\.pre_quant_scale$"),
    ("block-wise float8", r"\.weight_scale_inv$"),
    ("ModelOpt simulated", r"_quantizer\."),
    ("MXFP4", r"_blocks$"),
    ("codebook (AQLM or VPTQ)", r"\.(codebooks|centroids)"),
)
"""What leaves tensors of these names beside its codes."""

_METADATA = "_quantization_metadata"
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_PLAIN = ("float32", "fp32", "float16", "fp16", "bfloat16", "bf16")
_HARMLESS = ("format", "full_precision_matrix_mult", "orig_dtype")
"""Entries of a ComfyUI layer's description that change no value."""
_METHODS = ("compressed-tensors", "fbgemm_fp8", "modelopt")
"""`quant_method` of config.json that may stand for scaled float8; the tensors tell."""
_GIVE = "give the file that it was made from, or one in float8 with a scale for each tensor or row"


class QuantizedWeights(ValueError):
    """Weights whose values cannot be had from the file; says of what kind they are."""


@dataclass(frozen=True)
class Scales:
    """What is beside the weights of a file.

    Attributes:
        of: name of a weight -> name of its scale.
        beside: names that are no weights: scales and descriptions.
    """

    of: Mapping[str, str]
    beside: frozenset[str]


def find_scales(
    dtypes: Mapping[str, torch.dtype],
    shapes: Mapping[str, tuple[int, ...]],
    headers: Sequence[Mapping[str, str]],
    read: Callable[[str], Tensor],
) -> Scales:
    """Which tensors of a file are scales, and of what.

    Args:
        dtypes, shapes: of every tensor, by name.
        headers: the strings in the header of each file.
        read: finds the values of small tensors: descriptions of formats.

    Raises:
        QuantizedWeights: names the kind of quantisation that is not read, or the scale that is
            missing or does not fit its weight.
    """
    for kind, pattern in _KINDS:
        if found := next((name for name in dtypes if re.search(pattern, name)), None):
            raise _refused(kind, found)
    described = _described(dtypes, headers, read)
    for weight, description in described.items():
        _check_format(weight, description)
    scales: dict[str, str] = {}
    beside = {name for name in dtypes if name.rpartition(".")[2] == MARKER}
    marked = bool(beside)
    for name in dtypes:
        layer, _, last = name.rpartition(".")
        weight = f"{layer}.weight" if layer else "weight"
        if weight not in dtypes:
            continue  # the check of keys names it
        if last in _WITHOUT_VALUE:
            beside.add(name)
        elif last in _SCALES:
            if weight in scales:
                raise QuantizedWeights(f"holds two scales of {weight}: {scales[weight]} and {name}")
            _check_scale(weight, name, dtypes, shapes)
            scales[weight] = name
            beside.add(name)
    _check_complete(dtypes, scales, described, marked)
    # codes of an unknown kind are named before anything is made of their shapes
    check_integers({n: dtypes[n] for n, s in shapes.items() if n.endswith("weight") and len(s) > 1})
    return Scales(scales, frozenset(beside))


def dequantized(part: Tensor, scale: Tensor, rows: slice, name: str) -> Tensor:
    """Values of a part of a scaled weight, in float32.

    Args:
        part: as stored, of any of its rows and columns.
        scale: of the whole weight: one number, or one each row.
        rows: which of the weight's rows (its first dimension) the part has.
        name: of the scale.

    Raises:
        QuantizedWeights: the scale, or a product with it, is no finite number.
    """
    scale = scale.flatten().float()
    if scale.numel() > 1:
        scale = scale[rows].view(-1, *[1] * (part.dim() - 1))
    values = part.to(torch.float32, copy=True).mul_(scale)
    largest = (scale.double() * torch.finfo(part.dtype).max).abs().sum()
    within = largest <= torch.finfo(torch.float32).max  # not where it is NaN
    if not within and not torch.equal(values.isfinite(), part.float().isfinite()):
        raise QuantizedWeights(f"{name} is not finite, or scales its weight beyond float32")
    return values


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without its scales, scaled weights in float32; all are floating-point numbers.

    Raises:
        QuantizedWeights: see `find_scales`.
    """
    dtypes = {name: one.dtype for name, one in tensors.items()}
    shapes = {name: tuple(one.shape) for name, one in tensors.items()}
    scales = find_scales(dtypes, shapes, [], lambda name: tensors[name])
    found = {name: one for name, one in tensors.items() if name not in scales.beside}
    check_integers({name: dtypes[name] for name in found})
    for name, scale in scales.of.items():
        found[name] = dequantized(tensors[name], tensors[scale], slice(None), scale)
    return found


def check_integers(dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise QuantizedWeights where weights are codes: of another type than `FLOATS`."""
    wrong = [f"{name} ({one})" for name, one in dtypes.items() if one not in FLOATS]
    if wrong:
        more = f" … and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise QuantizedWeights(
            f"holds quantised or integer weights, which are not read: {', '.join(wrong[:8])}"
            f"{more}; {_GIVE}"
        )


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


# ---- checks --------------------------------------------------------------------------------


def _refused(kind: str, example: str) -> QuantizedWeights:
    return QuantizedWeights(f"holds {kind} weights ({example}), which are not read; {_GIVE}")


def _check_scale(
    weight: str,
    scale: str,
    dtypes: Mapping[str, torch.dtype],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    if dtypes[weight] not in FLOATS:
        raise _refused(f"{str(dtypes[weight]).removeprefix('torch.')} scaled", weight)
    if dtypes[scale] not in _WIDE:
        raise _refused(f"MX (block-wise, scales of type {dtypes[scale]})", scale)
    shape, found = shapes[weight], shapes[scale]
    whole = all(size == 1 for size in found)
    by_row = bool(shape) and found in ((shape[0],), (shape[0], *[1] * (len(shape) - 1)))
    if not (whole or by_row):
        raise _refused(f"block-wise scaled (scales {found} of a weight {shape})", scale)


def _check_complete(
    dtypes: Mapping[str, torch.dtype],
    scales: Mapping[str, str],
    described: Iterable[str],
    marked: bool,
) -> None:
    """A float8 weight lacks a scale if the same layer of another block has one, or it should."""

    def layer(name: str) -> str:
        return re.sub(r"\d+", "#", name)

    scaled = {layer(name) for name in scales if dtypes[name] in _FLOAT8} | {
        layer(name) for name in described
    }
    lost = [
        name
        for name, dtype in dtypes.items()
        if dtype in _FLOAT8 and name not in scales and layer(name) in scaled
    ]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise QuantizedWeights(
            f"is scaled float8, and the scale of {lost[0]}{more} is missing; get it again"
        )
    if marked and not scales and any(one in _FLOAT8 for one in dtypes.values()):
        raise QuantizedWeights(
            f"says by {MARKER} that its float8 weights are scaled, and holds no scales "
            f"({' or '.join(_SCALES)}); get it again"
        )


def _described(
    dtypes: Mapping[str, torch.dtype],
    headers: Sequence[Mapping[str, str]],
    read: Callable[[str], Tensor],
) -> dict[str, Any]:
    """What ComfyUI says of the formats of weights, in headers and beside them.

    A header may also speak of other parts of its file, and with a prefix that is cut off here.
    """
    weights = {name for name in dtypes if name.endswith(".weight")}
    found = {}
    for layer, description in (item for header in headers for item in _layers(header)):
        parts = f"{layer}.weight".split(".")
        names = (".".join(parts[begin:]) for begin in range(len(parts) - 1))
        if name := next((name for name in names if name in weights), None):
            found[name] = description
    for name, dtype in dtypes.items():
        if name.endswith(".comfy_quant"):
            try:
                if dtype != torch.uint8:
                    raise ValueError
                description = json.loads(bytes(read(name).flatten().tolist()))
            except ValueError:  # not JSON, not UTF-8
                raise QuantizedWeights(
                    f"holds a {name} that is no description of a format; get it again"
                ) from None
            found[f"{name.removesuffix('comfy_quant')}weight"] = description
    return found


def _layers(header: Mapping[str, str]) -> list[tuple[str, Any]]:
    try:
        return list(json.loads(header.get(_METADATA, "{}")).get("layers", {}).items())
    except (ValueError, AttributeError):
        raise QuantizedWeights(f"has a {_METADATA} that is not usable; get it again") from None


def _check_format(weight: str, described: Any) -> None:
    if not isinstance(described, Mapping) or "format" not in described:
        raise QuantizedWeights(f"does not say the format of {weight}: {described!r}; get it again")
    if described["format"] not in (*_FORMATS, *_PLAIN):
        raise _refused(f"ComfyUI {described['format']}", weight)
    changed = [name for name, value in described.items() if value and name not in _HARMLESS]
    if changed:
        raise _refused(f"ComfyUI {described['format']} with {', '.join(changed)}", weight)
