"""The autoencoder alone: BFL's `ae.safetensors` to diffusers' `vae` folder, and back."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from torchtitan_flux.encoders.autoencoder import AutoencoderArgs, StoredAutoencoder, to_diffusers
from torchtitan_flux.encoders.autoencoder_layers import NORM_GROUPS
from torchtitan_flux.tensor_files.element_types import cast
from torchtitan_flux.tensor_files.safetensors_file import (
    SAFETENSORS,
    TensorsFile,
    UnreadableWeights,
    read_json,
    refuse_pickle,
    write_json,
)
from torchtitan_flux.tensor_files.state_dict_keys import KeyMismatch
from torchtitan_flux.weights.locations import WEIGHTS_NAME
from torchtitan_flux.weights.staging import TargetRefused, staged


def is_autoencoder(path: Path) -> bool:
    """Whether a path holds an autoencoder and no transformer; False where it cannot be told."""
    if path.is_dir():
        config = path / "config.json"
        return config.is_file() and read_json(config).get("_class_name") == "AutoencoderKL"
    if path.suffix not in SAFETENSORS or not path.is_file():
        return False
    return "encoder.conv_in.weight" in TensorsFile.open(path).shapes


def open_autoencoder(path: Path) -> tuple[AutoencoderArgs, dict[str, Tensor]]:
    """BFL's file or a diffusers `vae` folder under our names, on the pages of its file.

    Raises UnreadableWeights or KeyMismatch.
    """
    refuse_pickle(path)
    try:
        stored = StoredAutoencoder(path)
    except KeyMismatch:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise UnreadableWeights(str(error)) from None
    return stored.args, {name: stored.whole(name) for name in stored.shapes}


def convert_autoencoder(
    path: Path,
    target: Path,
    format: str,
    dtype: torch.dtype | None = None,
    verify: bool = False,
) -> None:
    """`convert` for an autoencoder, to "bfl" or "diffusers"."""
    if format not in ("bfl", "diffusers"):
        raise TargetRefused(f"{path} is an autoencoder; --to bfl or --to diffusers, not {format}")
    args, tensors = open_autoencoder(path)
    usual = AutoencoderArgs()
    if format == "bfl" and (args.scale_factor, args.shift_factor) != (
        usual.scale_factor,
        usual.shift_factor,
    ):
        raise ValueError(
            f"the autoencoder has scaling_factor {args.scale_factor} and shift_factor "
            f"{args.shift_factor}; BFL's layout has no place for them and would be read with "
            f"{usual.scale_factor} and {usual.shift_factor}; keep it as a diffusers folder"
        )
    tensors = {name: cast(one, dtype or one.dtype, name) for name, one in tensors.items()}
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with staged(target, format, needed) as made:
        file = made
        if format == "diffusers":
            made.mkdir()
            write_json(made / "config.json", vae_config(args))
            file = made / f"{WEIGHTS_NAME}.safetensors"
        stored = to_diffusers(tensors, args) if format == "diffusers" else tensors
        save_file({name: one.contiguous() for name, one in stored.items()}, file, {"format": "pt"})
        if verify:
            _, found = open_autoencoder(made)
            wrong = [name for name, one in tensors.items() if not torch.equal(found[name], one)]
            if wrong:
                raise UnreadableWeights(f"what was written differs from what was read: {wrong[0]}")


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
