"""Which architecture a file of weights holds: from what is written beside it, else from shapes."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tomli

from torchtitan_flux.model import FLAVORS, FluxModelArgs
from torchtitan_flux.tensor_files.quantized import check_config
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights, read_json
from torchtitan_flux.tensor_files.state_dict_keys import Shape

METADATA_KEY = "torchtitan_flux.model_args"
"""Where our safetensors files keep the arguments that shapes do not show."""
ARGS_FILE = "model_args.json"
"""The same beside a checkpoint that was converted."""
GUIDANCE = ("guidance_in.", "time_text_embed.guidance_embedder.")
"""What names of guidance weights begin with: ours and Black Forest Labs', diffusers'."""

_FREE = (
    "in_channels",
    "out_channels",
    "vec_in_dim",
    "context_in_dim",
    "guidance_embed",
    "depth",
    "depth_single_blocks",
)
"""What weights of a flavor may have otherwise: what follows encoders, and what pruning takes."""
_CLASS = "FluxTransformer2DModel"
_CONFIG = {
    "in_channels": "in_channels",
    "vec_in_dim": "pooled_projection_dim",
    "context_in_dim": "joint_attention_dim",
    "num_heads": "num_attention_heads",
    "depth": "num_layers",
    "depth_single_blocks": "num_single_layers",
    "guidance_embed": "guidance_embeds",
}
"""Our argument -> entry of FluxTransformer2DModel's configuration."""
_FIXED = {"mlp_ratio": 4.0, "theta": 10_000, "qkv_bias": True}
"""What it has no entry for."""

_PATTERNS = {
    "the input layer": r"^(img_in|x_embedder)\.weight$",
    "the output layer": r"^(final_layer\.linear|proj_out)\.weight$",
    "vector_in": r"^(vector_in\.in_layer|time_text_embed\.text_embedder\.linear_1)\.weight$",
    "txt_in": r"^(txt_in|context_embedder)\.weight$",
    "the norm of queries": r"query_norm\.(scale|weight)$|attn\.norm_q\.weight$",
    "the first layer of an MLP": r"\.(img_mlp\.0|ff\.net\.0\.proj|proj_mlp)\.weight$"
    r"|\.linear2(_by_head)?\.weight$",
}
"""Layers whose shapes tell the architecture, in BFL's and diffusers' names."""
_QKV_BIAS = r"img_attn\.qkv(_by_head)?\.bias$|^transformer_blocks\.\d+\.attn\.to_q\.bias$"


def to_metadata(args: FluxModelArgs) -> dict[str, str]:
    """What a safetensors file of ours says about itself."""
    return {"format": "pt", METADATA_KEY: json.dumps(asdict(args))}


def from_json(path: Path, text: str) -> FluxModelArgs:
    """Arguments from what `to_metadata` or a conversion wrote; UnreadableWeights if corrupt."""
    try:
        content = json.loads(text)
        return FluxModelArgs(**{**content, "axes_dim": tuple(content["axes_dim"])})
    except (ValueError, TypeError, KeyError) as error:
        raise UnreadableWeights(f"{path} states no usable {METADATA_KEY} ({error})") from None


def flavor_of_run(checkpoint: Path) -> FluxModelArgs | None:
    """The flavor that the run of a checkpoint names in the configuration that it left."""
    model = (run_config(checkpoint) or {}).get("model")
    return FLAVORS.get(str(model.get("flavor"))) if isinstance(model, dict) else None


def run_config(checkpoint: Path) -> dict[str, Any] | None:
    """The resolved configuration of the run that a checkpoint belongs to, where it left one."""
    for folder in list(checkpoint.resolve().parents)[:3]:
        for path in (folder / "config.toml", folder / "config.json"):
            if path.is_file():
                config = read_json(path) if path.suffix == ".json" else _read_toml(path)
                return config if "model" in config else None
    return None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnreadableWeights(f"{path} is not TOML ({error})") from None


def from_diffusers_config(path: Path) -> FluxModelArgs:
    """Arguments from `config.json`; UnreadableWeights unless it is of FLUX.1, not quantised."""
    config = read_json(path)
    described = config.get("_class_name") or config.get("architectures")  # of transformers' models
    if described != _CLASS:
        raise UnreadableWeights(
            f"{path} describes a {described!r}, needed is a {_CLASS}: give the folder "
            "`transformer` of a FLUX.1 model, or the folder that holds it"
        )
    try:
        check_config(config)
        if config.get("patch_size", 1) != 1:
            raise ValueError(f"patch_size is {config['patch_size']!r}, FLUX.1's is 1 there")
        found = {ours: config[entry] for ours, entry in _CONFIG.items()}
        return FluxModelArgs(
            **found | {"guidance_embed": bool(found["guidance_embed"])},
            out_channels=config.get("out_channels") or config["in_channels"],
            hidden_size=config["num_attention_heads"] * config["attention_head_dim"],
            axes_dim=tuple(config.get("axes_dims_rope", FluxModelArgs.axes_dim)),
            **_FIXED,
        )
    except KeyError as error:
        raise UnreadableWeights(f"{path} has no entry {error}") from None
    except (ValueError, TypeError) as error:
        raise UnreadableWeights(f"{path} does not describe a FLUX.1 model: {error}") from None


def to_diffusers_config(args: FluxModelArgs) -> dict[str, Any]:
    """`config.json` for FluxTransformer2DModel; ValueError names what it has no entry for."""
    wrong = [
        f"{name} is {getattr(args, name)}, there it is always {value}"
        for name, value in _FIXED.items()
        if getattr(args, name) != value
    ]
    if wrong:
        raise ValueError(
            f"diffusers' {_CLASS} cannot hold this model ({'; '.join(wrong)}); convert to bfl, "
            "comfyui or dcp"
        )
    return {
        "_class_name": _CLASS,
        "_diffusers_version": "0.30.0",  # the first release with FLUX.1
        "attention_head_dim": args.head_dim,
        "axes_dims_rope": list(args.axes_dim),
        "out_channels": None if args.out_channels == args.in_channels else args.out_channels,
        "patch_size": 1,
        **{entry: getattr(args, ours) for ours, entry in _CONFIG.items()},
    }


def from_shapes(
    path: Path, shapes: Mapping[str, Shape], flavor: FluxModelArgs | None
) -> FluxModelArgs:
    """Arguments from the shapes of tensors in any layout.

    Rotary axes and geometry are those of `flavor`; without one, FLUX.1's, where heads are 128 wide
    as FLUX.1's are. UnreadableWeights: a tensor that is needed is missing, or the axes are unknown.
    """
    layers: dict[str, tuple[str, Shape]] = {}
    for layer, pattern in _PATTERNS.items():
        one = next((n for n in shapes if re.search(pattern, n)), None)
        if one is None or len(shapes[one]) != (1 if "norm" in layer else 2):
            raise UnreadableWeights(f"{path} holds no FLUX transformer: {layer} is missing")
        layers[layer] = one, shapes[one]
    (hidden, in_channels), (head_dim, *_) = (
        layers[one][1] for one in ("the input layer", "the norm of queries")
    )
    name, (rows, columns) = layers["the first layer of an MLP"]
    try:
        found = {
            "in_channels": in_channels,
            "out_channels": layers["the output layer"][1][0],
            "vec_in_dim": layers["vector_in"][1][1],
            "context_in_dim": layers["txt_in"][1][1],
            "hidden_size": hidden,
            "mlp_ratio": (columns - hidden if "linear2" in name else rows) / hidden,
            "num_heads": hidden // head_dim,
            "depth": _count(shapes, "(double|transformer)_blocks"),
            "depth_single_blocks": _count(shapes, "single(_transformer)?_blocks"),
            "qkv_bias": any(re.search(_QKV_BIAS, name) for name in shapes),
            "guidance_embed": any(name.startswith(GUIDANCE) for name in shapes),
        }
    except ZeroDivisionError:
        raise UnreadableWeights(f"{path} holds tensors that are no FLUX transformer's") from None
    if flavor is not None:
        check_matches_flavor(path, found, flavor)
    elif head_dim != FluxModelArgs().head_dim:
        raise UnreadableWeights(
            f"{path} does not say how its heads of {head_dim} are divided among the rotary axes; "
            f"name the flavor that it was made with (--flavor, one of {', '.join(FLAVORS)})"
        )
    try:
        return replace(flavor or FluxModelArgs(), **found)
    except ValueError as error:
        raise UnreadableWeights(f"{path} is no FLUX transformer: {error}") from None


def _count(names: Mapping[str, Shape], blocks: str) -> int:
    """Blocks of a kind, up to the highest number; one missing in between is named later."""
    found = (re.match(rf"{blocks}\.(?P<number>\d+)\.", name) for name in names)
    return max((int(one["number"]) for one in found if one), default=-1) + 1


def check_matches_flavor(path: Path, found: Mapping[str, Any], flavor: FluxModelArgs) -> None:
    """Raise UnreadableWeights unless weights are of a flavor, whatever its encoders and blocks."""
    differ = [
        f"{name} is {value}, the flavor's {getattr(flavor, name)}"
        for name, value in found.items()
        if name not in _FREE and value != getattr(flavor, name)
    ]
    if differ:
        raise UnreadableWeights(
            f"{path} is of another flavor than named: {'; '.join(differ)}; name the one that it "
            f"was made with (of {', '.join(FLAVORS)}), or none"
        )
