"""Which architecture a file of weights holds: from what is written beside it, else from shapes."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tomli

from torchtitan_flux.model import FLAVORS, FluxModelArgs
from torchtitan_flux.tensor_files.quantized import QuantizedWeights, check_config
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights, read_json
from torchtitan_flux.tensor_files.weight_kinds import CLASSES

METADATA_KEY = "torchtitan_flux.model_args"
"""Where our safetensors files keep the arguments that shapes do not show."""
ARGS_FILE = "model_args.json"
"""The same beside a checkpoint that was converted."""

Shapes = Mapping[str, tuple[int, ...]]

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
_CONDITIONED = {
    384: "FLUX.1 Fill, which sees a mask and the masked picture",
    128: "FLUX.1 Canny or Depth, which see a second picture",
}
"""Features of an image token that goes in, where 64 come out -> whose they are."""
_CLASS = "FluxTransformer2DModel"
_MLP_RATIO, _THETA = 4.0, 10_000  # what FluxTransformer2DModel has no entry for


def to_metadata(args: FluxModelArgs) -> dict[str, str]:
    """What a safetensors file of ours says about itself."""
    return {"format": "pt", METADATA_KEY: json.dumps(asdict(args))}


def from_metadata(path: Path, metadata: Mapping[str, str]) -> FluxModelArgs | None:
    """The arguments that `to_metadata` wrote, or None. UnreadableWeights where they are spoilt."""
    if METADATA_KEY not in metadata:
        return None
    try:
        return _from_json(json.loads(metadata[METADATA_KEY]))
    except (ValueError, TypeError, KeyError) as error:
        raise UnreadableWeights(f"{path}: its {METADATA_KEY} is not usable ({error})") from None


def from_args_file(path: Path) -> FluxModelArgs:
    """The arguments beside a converted checkpoint."""
    try:
        return _from_json(read_json(path))
    except (ValueError, TypeError, KeyError) as error:
        raise UnreadableWeights(f"{path} does not describe a FLUX model ({error})") from None


def _from_json(content: dict[str, Any]) -> FluxModelArgs:
    return FluxModelArgs(**{**content, "axes_dim": tuple(content["axes_dim"])})


def flavor_of_run(checkpoint: Path) -> FluxModelArgs | None:
    """The flavor that the run of a checkpoint names in the configuration that it left."""
    config = run_config(checkpoint)
    model = config.get("model") if config else None
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
    """Arguments from a transformer folder's `config.json`.

    Raises:
        UnreadableWeights: it describes another class, a variant that is not FLUX.1's, or quantised
            weights.
    """
    config = read_json(path)
    classes = config.get("architectures")  # of transformers' models
    first = classes[0] if isinstance(classes, list) and classes else None
    described = config.get("_class_name") or first
    if described != _CLASS:
        known = CLASSES.get(str(described))
        what = f", {known}" if known else ""
        raise UnreadableWeights(
            f"{path} describes a {described!r}{what}, needed is a {_CLASS}: give the folder "
            "`transformer` of a FLUX.1 model, or the folder that holds it"
        )
    try:
        check_config(config)
    except QuantizedWeights as error:
        raise UnreadableWeights(f"{path}: {error}") from None
    if config.get("patch_size", 1) != 1:
        raise UnreadableWeights(
            f"{path}: patch_size is {config['patch_size']!r}; FLUX.1 has 1 there, images are cut "
            "into patches before"
        )
    try:
        heads, width = config["num_attention_heads"], config["attention_head_dim"]
        return FluxModelArgs(
            in_channels=config["in_channels"],
            out_channels=config.get("out_channels") or config["in_channels"],
            vec_in_dim=config["pooled_projection_dim"],
            context_in_dim=config["joint_attention_dim"],
            hidden_size=heads * width,
            mlp_ratio=_MLP_RATIO,
            num_heads=heads,
            depth=config["num_layers"],
            depth_single_blocks=config["num_single_layers"],
            axes_dim=tuple(config.get("axes_dims_rope", FluxModelArgs.axes_dim)),
            theta=_THETA,
            guidance_embed=bool(config["guidance_embeds"]),
        )
    except KeyError as error:
        raise UnreadableWeights(f"{path} has no entry {error}") from None
    except (ValueError, TypeError) as error:
        raise UnreadableWeights(f"{path} does not describe a FLUX.1 model: {error}") from None


def to_diffusers_config(args: FluxModelArgs) -> dict[str, Any]:
    """`config.json` for FluxTransformer2DModel.

    Raises:
        ValueError: diffusers' model cannot be built like this; names each argument.
    """
    fixed = {"mlp_ratio": _MLP_RATIO, "theta": _THETA, "qkv_bias": True}
    wrong = [
        f"{name} is {getattr(args, name)}, there it is always {value}"
        for name, value in fixed.items()
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
        "guidance_embeds": args.guidance_embed,
        "in_channels": args.in_channels,
        "joint_attention_dim": args.context_in_dim,
        "num_attention_heads": args.num_heads,
        "num_layers": args.depth,
        "num_single_layers": args.depth_single_blocks,
        "out_channels": None if args.out_channels == args.in_channels else args.out_channels,
        "patch_size": 1,
        "pooled_projection_dim": args.vec_in_dim,
    }


def from_shapes(path: Path, shapes: Shapes, alike: FluxModelArgs | None) -> FluxModelArgs:
    """Arguments from the shapes of tensors in anybody's names.

    Args:
        path: for messages.
        shapes: of every tensor.
        alike: a flavor that has the same rotary axes and geometry, where one is known. Without,
            they are FLUX.1's where heads are 128 wide as FLUX.1's are.

    Raises:
        UnreadableWeights: a tensor that is needed is missing, or the rotary axes cannot be known.
    """
    norm = next((name for name in shapes if _NORM.search(name)), None)
    names = _DIFFUSERS if "x_embedder.weight" in shapes else _BFL
    try:
        if norm is None:
            raise KeyError(f"{names.double}.0: the norm of queries")
        hidden, in_channels = shapes[names.img_in]
        (head_dim,) = shapes[norm]
        found = {
            "in_channels": in_channels,
            "out_channels": shapes[names.out][0],
            "vec_in_dim": shapes[names.vector_in][1],
            "context_in_dim": shapes[names.txt_in][1],
            "hidden_size": hidden,
            "mlp_ratio": _mlp_hidden(shapes, names, hidden) / hidden,
            "num_heads": hidden // head_dim,
            **_blocks(shapes),
            "qkv_bias": any(re.search(names.qkv_bias, name) for name in shapes),
            "guidance_embed": any(name.startswith(names.guidance) for name in shapes),
        }
    except KeyError as error:
        raise UnreadableWeights(
            f"{path} holds no FLUX transformer in {names.whose} names: {error.args[0]} is missing"
        ) from None
    except (ValueError, IndexError, ZeroDivisionError):
        raise UnreadableWeights(f"{path} holds tensors that are no FLUX transformer's") from None
    if alike is not None:
        check_alike(path, found, alike)
    elif head_dim == FluxModelArgs().head_dim:
        alike = FluxModelArgs()
    else:
        raise UnreadableWeights(
            f"{path} does not say how its heads of {head_dim} are divided among the rotary axes; "
            f"name the flavor that it was made with (--flavor, one of {', '.join(FLAVORS)})"
        )
    try:
        return replace(alike, **found)
    except ValueError as error:
        raise UnreadableWeights(f"{path} is no FLUX transformer: {error}") from None


def check_alike(path: Path, found: Mapping[str, Any], flavor: FluxModelArgs) -> None:
    """Weights must be of a flavor, but for widths that follow encoders, and guidance.

    Raises:
        UnreadableWeights: names what differs.
    """
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


def refuse_conditioned(path: Path, shapes: Shapes, args: FluxModelArgs) -> None:
    """Refuse weights that see another picture beside the noise, where the model does not.

    Raises:
        UnreadableWeights: names the model.
    """
    shape = shapes.get(_BFL.img_in) or shapes.get(_DIFFUSERS.img_in)
    if shape is not None and len(shape) == 2 and shape[1] != args.in_channels:
        raise_conditioned(path, shape[1], args.out_channels)


def raise_conditioned(path: Path, in_channels: int, out_channels: int) -> None:
    """Raise UnreadableWeights where these widths are of Fill, Canny or Depth."""
    if out_channels == FluxModelArgs().out_channels and in_channels in _CONDITIONED:
        raise UnreadableWeights(
            f"{path} is {_CONDITIONED[in_channels]} beside the noise ({in_channels} features of an "
            f"image token go in, {out_channels} come out); it is not trained or drawn with here: "
            "give FLUX.1-dev or FLUX.1-schnell, or another model of text alone"
        )


@dataclass(frozen=True)
class _Names:
    """Tensors whose shapes tell the architecture, in one layout."""

    whose: str
    img_in: str
    txt_in: str
    vector_in: str
    out: str
    guidance: str
    double: str
    mlp: str
    qkv_bias: str


_BFL = _Names(
    whose="Black Forest Labs'",
    img_in="img_in.weight",
    txt_in="txt_in.weight",
    vector_in="vector_in.in_layer.weight",
    out="final_layer.linear.weight",
    guidance="guidance_in.",
    double="double_blocks",
    mlp="double_blocks.0.img_mlp.0.weight",
    qkv_bias=r"img_attn\.qkv(_by_head)?\.bias$",
)
_DIFFUSERS = _Names(
    whose="diffusers'",
    img_in="x_embedder.weight",
    txt_in="context_embedder.weight",
    vector_in="time_text_embed.text_embedder.linear_1.weight",
    out="proj_out.weight",
    guidance="time_text_embed.guidance_embedder.",
    double="transformer_blocks",
    mlp="transformer_blocks.0.ff.net.0.proj.weight",
    qkv_bias=r"(?<!single_)transformer_blocks\.\d+\.attn\.to_q\.bias$",
)
_NORM = re.compile(r"query_norm\.(scale|weight)$|attn\.norm_q\.weight$")


def _mlp_hidden(shapes: Shapes, names: _Names, hidden: int) -> int:
    if names.mlp in shapes:
        return shapes[names.mlp][0]
    fused = next((n for n in shapes if re.search(r"\.linear2(_by_head)?\.weight$", n)), None)
    if fused is not None:
        return math.prod(shapes[fused]) // hidden - hidden
    apart = next((n for n in shapes if n.endswith(".proj_mlp.weight")), None)
    if apart is None:
        raise KeyError(names.mlp)
    return shapes[apart][0]


def _blocks(shapes: Shapes) -> dict[str, int]:
    """How many blocks there are, by the arguments' names, in anybody's layout.

    Up to the highest number; one that is missing in between is named later.
    """
    return {
        "depth": _count(shapes, "(double|transformer)_blocks"),
        "depth_single_blocks": _count(shapes, "single(_transformer)?_blocks"),
    }


def _count(shapes: Shapes, blocks: str) -> int:
    found = [m["number"] for n in shapes if (m := re.match(rf"{blocks}\.(?P<number>\d+)\.", n))]
    return max(map(int, found), default=-1) + 1
