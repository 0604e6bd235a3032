"""Names of the autoencoder's weights: ours (Black Forest Labs' layout) and diffusers'.

Dict to dict. Our layout is that of BFL's `ae.safetensors`; `from_bfl` and `to_bfl` therefore change
nothing, but check. Every function raises KeyMismatch naming all missing, unknown and mis-shaped
keys.

| BFL | diffusers AutoencoderKL |
|---|---|
| {encoder,decoder}.norm_out | conv_norm_out |
| mid.block_{1,2} | mid_block.resnets.{0,1} |
| mid.attn_1.{norm,q,k,v,proj_out}, weights (O, I, 1, 1) | mid_block.attentions.0.{group_norm, |
| | to_q,to_k,to_v,to_out.0}, weights (O, I) |
| encoder.down.i.block.j, .downsample.conv | down_blocks.i.resnets.j, .downsamplers.0.conv |
| decoder.up.i.block.j, .upsample.conv | up_blocks.(n-1-i).resnets.j, .upsamplers.0.conv |
| nin_shortcut | conv_shortcut |
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import TypeVar

from torch import Tensor

from torchtitan_flux.encoders.autoencoder_layers import AutoencoderArgs, parameter_shapes
from torchtitan_flux.tensor_files.state_dict_keys import check_keys

T = TypeVar("T")

_RENAMES = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
)
_INPUT = "encoder.conv_in.weight"  # in either layout
_ATTENTION_PROJECTION = re.compile(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$")


@cache
def _diffusers_names(args: AutoencoderArgs) -> dict[str, str]:
    """Our name -> diffusers' name, for every parameter."""
    levels = len(args.ch_mult)

    def rename(name: str) -> str:
        name = re.sub(
            r"^decoder\.up\.(\d+)\.",
            lambda found: f"decoder.up_blocks.{levels - 1 - int(found[1])}.",
            name,
        )
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        return name

    return {name: rename(name) for name in parameter_shapes(args)}


@cache
def _diffusers_shapes(args: AutoencoderArgs) -> dict[str, tuple[int, ...]]:
    names = _diffusers_names(args)
    return {
        names[name]: shape[:2] if _ATTENTION_PROJECTION.search(name) else shape
        for name, shape in parameter_shapes(args).items()
    }


def without_prefix(tensors: Mapping[str, T]) -> dict[str, T]:
    """Whatever stands before all names, such as `first_stage_model.` or `vae.`, is cut off."""
    found = [name.removesuffix(_INPUT) for name in tensors if name.endswith(f".{_INPUT}")]
    if len(found) != 1 or not all(name.startswith(found[0]) for name in tensors):
        return dict(tensors)
    return {name.removeprefix(found[0]): one for name, one in tensors.items()}


def from_bfl(state_dict: Mapping[str, Tensor], args: AutoencoderArgs) -> dict[str, Tensor]:
    """BFL's `ae.safetensors` to ours: the same names, checked (KeyMismatch)."""
    check_keys(state_dict, parameter_shapes(args), "autoencoder in BFL layout")
    return dict(state_dict)


def to_bfl(state_dict: Mapping[str, Tensor], args: AutoencoderArgs) -> dict[str, Tensor]:
    """Ours to BFL's `ae.safetensors`: the same names, checked (KeyMismatch)."""
    check_keys(state_dict, parameter_shapes(args), "autoencoder")
    return dict(state_dict)


def from_diffusers(state_dict: Mapping[str, Tensor], args: AutoencoderArgs) -> dict[str, Tensor]:
    """AutoencoderKL to ours; the attention's (O, I) matrices become (O, I, 1, 1) convolutions.

    Raises:
        KeyMismatch: naming every missing, unknown and mis-shaped key in diffusers' names.
    """
    check_keys(state_dict, _diffusers_shapes(args), "autoencoder in diffusers layout")
    return {
        ours: state_dict[theirs].reshape(parameter_shapes(args)[ours])
        for ours, theirs in _diffusers_names(args).items()
    }


def to_diffusers(state_dict: Mapping[str, Tensor], args: AutoencoderArgs) -> dict[str, Tensor]:
    """Ours to AutoencoderKL; the inverse of `from_diffusers`.

    Raises:
        KeyMismatch: naming every missing, unknown and mis-shaped key in our names.
    """
    check_keys(state_dict, parameter_shapes(args), "autoencoder")
    return {
        theirs: state_dict[ours].reshape(_diffusers_shapes(args)[theirs])
        for ours, theirs in _diffusers_names(args).items()
    }
