"""Names of the autoencoder's weights: ours, which are those of BFL's `ae.safetensors`, elsewhere.

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
from typing import Literal, TypeVar

from torch import Tensor

from torchtitan_flux.encoders.autoencoder_layers import AutoencoderArgs, parameter_shapes
from torchtitan_flux.tensor_files.state_dict_keys import Shape, check_keys, shapes_of

T = TypeVar("T")
AutoencoderLayout = Literal["bfl", "diffusers"]

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


@cache
def layout_names(layout: AutoencoderLayout, args: AutoencoderArgs) -> dict[str, tuple[str, Shape]]:
    """Our name -> name and shape in a layout, for every parameter; values are in equal order."""
    if layout == "bfl":
        return {name: (name, shape) for name, shape in parameter_shapes(args).items()}
    last = len(args.ch_mult) - 1

    def entry(name: str, shape: Shape) -> tuple[str, Shape]:
        matrix = re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", name)
        if level := re.match(r"decoder\.up\.(\d+)\.", name):
            name = f"decoder.up_blocks.{last - int(level[1])}.{name[level.end() :]}"
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        return name, shape[:2] if matrix else shape

    return {name: entry(name, shape) for name, shape in parameter_shapes(args).items()}


def without_prefix(tensors: Mapping[str, T]) -> dict[str, T]:
    """Whatever stands before all names, such as `first_stage_model.` or `vae.`, is cut off."""
    found = [name.removesuffix(_INPUT) for name in tensors if name.endswith(f".{_INPUT}")]
    if len(found) != 1 or not all(name.startswith(found[0]) for name in tensors):
        return dict(tensors)
    return {name.removeprefix(found[0]): one for name, one in tensors.items()}


def to_ours(
    layout: AutoencoderLayout, state_dict: Mapping[str, Tensor], args: AutoencoderArgs
) -> dict[str, Tensor]:
    """A layout's state dict under our names and in our shapes. Raises KeyMismatch."""
    names, ours = layout_names(layout, args), parameter_shapes(args)
    check_keys(shapes_of(state_dict), dict(names.values()), f"autoencoder in {layout} layout")
    return {own: state_dict[name].reshape(ours[own]) for own, (name, _) in names.items()}


def from_ours(
    layout: AutoencoderLayout, state_dict: Mapping[str, Tensor], args: AutoencoderArgs
) -> dict[str, Tensor]:
    """The inverse of `to_ours`. Raises KeyMismatch."""
    check_keys(shapes_of(state_dict), parameter_shapes(args), "autoencoder")
    names = layout_names(layout, args)
    return {name: state_dict[own].reshape(shape) for own, (name, shape) in names.items()}
