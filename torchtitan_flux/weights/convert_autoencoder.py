"""The autoencoder alone: BFL's `ae.safetensors` to diffusers' `vae` folder, and back."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from torchtitan_flux.encoders.autoencoder import AutoencoderArgs, read_args
from torchtitan_flux.encoders.autoencoder_keys import without_prefix
from torchtitan_flux.encoders.autoencoder_layers import NORM_GROUPS
from torchtitan_flux.tensor_files.element_types import cast
from torchtitan_flux.tensor_files.quantized import QuantizedWeights, plain
from torchtitan_flux.tensor_files.safetensors_file import (
    SAFETENSORS,
    TensorsFile,
    UnreadableWeights,
    read_json,
    refuse_pickle,
)
from torchtitan_flux.tensor_files.safetensors_writer import TensorsWriter
from torchtitan_flux.weights import autoencoder_maps as maps
from torchtitan_flux.weights.open import WEIGHTS_NAME
from torchtitan_flux.weights.staging import TargetRefused, staged

_KEY = "encoder.autoencoder_path: "


@dataclass(frozen=True)
class AutoencoderWeights:
    """An autoencoder under our names, on the pages of its file.

    Attributes:
        path: what was opened.
        format: how it is stored.
        args: its architecture.
        tensors: by our names; not to be written to.
    """

    path: Path
    format: Literal["bfl", "diffusers"]
    args: AutoencoderArgs
    tensors: dict[str, Tensor]


def is_autoencoder(path: Path) -> bool:
    """Whether a path holds an autoencoder and no transformer; False where it cannot be told."""
    if path.is_dir():
        config = path / "config.json"
        return config.is_file() and read_json(config).get("_class_name") == "AutoencoderKL"
    if path.suffix not in SAFETENSORS or not path.is_file():
        return False
    return "encoder.conv_in.weight" in without_prefix(TensorsFile.open(path).shapes)


def autoencoder_args(path: Path) -> AutoencoderArgs:
    """Architecture of an autoencoder; UnreadableWeights where there is none."""
    refuse_pickle(path)
    try:
        return read_args(path)[0]
    except (ValueError, FileNotFoundError) as error:
        raise UnreadableWeights(str(error).removeprefix(_KEY)) from None


def open_autoencoder(path: Path) -> AutoencoderWeights:
    """An autoencoder from BFL's file or a diffusers `vae` folder.

    Raises:
        UnreadableWeights: it is neither, damaged, or quantised but for scaled float8.
        KeyMismatch: names every key that does not fit.
    """
    args = autoencoder_args(path)
    file = TensorsFile.open(read_args(path)[1])
    try:
        found = plain(without_prefix({name: file.tensor(name) for name in file.shapes}))
    except QuantizedWeights as error:
        raise UnreadableWeights(f"{file.path} {error}") from None
    if path.is_file():
        return AutoencoderWeights(path, "bfl", args, maps.from_bfl(found, args))
    return AutoencoderWeights(path, "diffusers", args, maps.from_diffusers(found, args))


def convert_autoencoder(
    path: Path,
    target: Path,
    format: Literal["bfl", "diffusers"],
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    verify: bool = False,
) -> None:
    """Write an autoencoder in the other layout; complete, or not at all.

    Args:
        path: BFL's file or a diffusers `vae` folder.
        target: a `.safetensors` file for "bfl", a folder for "diffusers".
        format: the layout to write.
        dtype: element type; None keeps it.
        overwrite, verify: as in `convert`.

    Raises:
        UnreadableWeights, KeyMismatch: the source is no autoencoder.
        TargetRefused: the target exists or is of another kind.
        ValueError: the format cannot hold it, or the element type one of its values.
    """
    if (target.suffix == ".safetensors") != (format == "bfl"):
        kind = "a file *.safetensors" if format == "bfl" else "a folder"
        raise TargetRefused(f"{target} is to be {kind} in format {format}")
    source = open_autoencoder(path)
    if dtype is not None:
        tensors = {name: cast(tensor, dtype, name) for name, tensor in source.tensors.items()}
        source = replace(source, tensors=tensors)
    needed = sum(tensor.nbytes for tensor in source.tensors.values())
    with staged(target, needed, overwrite, [path]) as stage:
        made = stage / target.name
        write_vae(source, made) if format == "diffusers" else _write_file(source, made)
        if verify:
            check_vae(source, made)


def _write_file(source: AutoencoderWeights, path: Path) -> None:
    """BFL's layout, which holds neither scale nor shift: they must be FLUX.1's."""
    usual, args = AutoencoderArgs(), source.args
    if (args.scale_factor, args.shift_factor) != (usual.scale_factor, usual.shift_factor):
        raise ValueError(
            f"{source.path} has scaling_factor {args.scale_factor} and shift_factor "
            f"{args.shift_factor}; BFL's layout has no place for them and would be read with "
            f"{usual.scale_factor} and {usual.shift_factor}; keep it as a diffusers folder"
        )
    _write(maps.to_bfl(source.tensors, args), path.parent, path.stem)


def write_vae(source: AutoencoderWeights, folder: Path) -> None:
    """A folder that AutoencoderKL opens; it must not exist."""
    folder.mkdir()
    _write(maps.to_diffusers(source.tensors, source.args), folder, WEIGHTS_NAME)
    config = json.dumps(vae_config(source.args), indent=2)
    (folder / "config.json").write_text(config + "\n")


def _write(tensors: dict[str, Tensor], folder: Path, name: str) -> None:
    specs = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    with TensorsWriter(folder, name, specs, {"format": "pt"}) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)


def check_vae(source: AutoencoderWeights, written: Path) -> None:
    """Read an autoencoder back; UnreadableWeights names the first tensor that differs."""
    found = open_autoencoder(written)
    for name, tensor in source.tensors.items():
        if not torch.equal(found.tensors[name], tensor):
            raise UnreadableWeights(f"what was written differs from {source.path}: {name}")


def vae_config(args: AutoencoderArgs, sample_size: int = 1024) -> dict[str, Any]:
    """config.json of a diffusers AutoencoderKL; `sample_size` in pixels is only a note there."""
    levels = len(args.ch_mult)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.30.0",
        "act_fn": "silu",
        "block_out_channels": list(args.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": args.in_channels,
        "latent_channels": args.z_channels,
        "layers_per_block": args.num_res_blocks,
        "mid_block_add_attention": True,
        "norm_num_groups": NORM_GROUPS,
        "out_channels": args.out_ch,
        "sample_size": sample_size,
        "scaling_factor": args.scale_factor,
        "shift_factor": args.shift_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }
