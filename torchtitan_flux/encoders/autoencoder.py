"""The FLUX.1 autoencoder as a codec, and loading it from a file of BFL's or a diffusers folder.

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
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchtitan_flux.encoders.autoencoder_layers import (
    NORM_GROUPS,
    AutoencoderArgs,
    Decoder,
    Encoder,
    parameter_shapes,
)
from torchtitan_flux.paths import absence
from torchtitan_flux.tensor_files.file_sets import weight_files
from torchtitan_flux.tensor_files.quantized import ScaledSource, check_config
from torchtitan_flux.tensor_files.safetensors_file import TensorsFile, read_json
from torchtitan_flux.tensor_files.sources import Box, FilesSource, Source
from torchtitan_flux.tensor_files.state_dict_keys import Shape, check_keys

_STEM = "diffusion_pytorch_model"
_LOGVAR_MIN, _LOGVAR_MAX = -30.0, 20.0
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


class Autoencoder(nn.Module):
    """The FLUX.1 autoencoder; a `Codec`. Computes in the dtype of its weights."""

    stochastic: bool = True

    def __init__(self, args: AutoencoderArgs) -> None:
        super().__init__()
        self.args = args
        self.channels = args.z_channels
        self.downscale = args.downscale
        self.encoder = Encoder(args)
        self.decoder = Decoder(args)

    @torch.no_grad()
    def encode(
        self, images: Float[Tensor, "b c H W"], noise: Float[Tensor, "b ch h w"] | None = None
    ) -> Float[Tensor, "b ch h w"]:
        """Normalised latents in the dtype of `images`: scale_factor * (z - shift_factor).

        z = mean + exp(logvar / 2) * noise, logvar clamped to [-30, 20] as in diffusers; without
        `noise`, z = mean. Sides are multiples of `downscale`.
        """
        moments = self.encoder(images.to(self.encoder.conv_in.weight.dtype)).to(images.dtype)
        z, logvar = moments.chunk(2, dim=1)
        if noise is not None:
            logvar = logvar.clamp(_LOGVAR_MIN, _LOGVAR_MAX)
            z = z + torch.exp(0.5 * logvar) * noise.to(z)
        return self.args.scale_factor * (z - self.args.shift_factor)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b ch h w"]) -> Float[Tensor, "b c H W"]:
        """Images, nominally in [-1, 1] and not clipped, in the dtype of `latents`."""
        z = latents / self.args.scale_factor + self.args.shift_factor
        return self.decoder(z.to(self.decoder.conv_in.weight.dtype)).to(latents.dtype)


class StoredAutoencoder(Source):
    """The weights of an autoencoder where they lie, under our names; every key is accounted for.

    `args` is its architecture. Raises FileNotFoundError or ValueError, see `load_autoencoder`.
    """

    def __init__(self, path: Path) -> None:
        file = path
        if path.is_dir():
            # a variant, such as fp16, where it is the only one
            found = [one for one in weight_files(path) if one.stem == _STEM and one.count == 1]
            file = path / (found[0].names[0] if len(found) == 1 else f"{_STEM}.safetensors")
            self.args = _args_of_folder(path)
        elif not path.is_file():
            raise FileNotFoundError(
                f"{path} {absence(path)}; give BFL's ae.safetensors or a diffusers vae folder"
            )
        stored = FilesSource([TensorsFile.open(file)])
        if not path.is_dir():
            self.args = _args_of_shapes(path, stored.shapes)
        self._source = ScaledSource(stored, file)
        self.shapes = parameter_shapes(self.args)
        names = {own: (own, shape) for own, shape in self.shapes.items()}
        names = diffusers_names(self.args) if path.is_dir() else names
        check_keys(self._source.shapes, dict(names.values()), str(file))
        self._names = {own: name for own, (name, _) in names.items()}
        self.dtypes = {own: self._source.dtypes[name] for own, name in self._names.items()}

    def part(self, name: str, box: Box) -> Tensor:
        return self._source.whole(self._names[name]).reshape(self.shapes[name])[box]

    def release(self, name: str) -> None:
        self._source.release(self._names[name])


def load_autoencoder(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """A frozen autoencoder, in eval mode, from either of the two formats in use.

    Args:
        path: a file in Black Forest Labs' layout (`ae.safetensors`; its architecture is read off
            the tensor shapes, scale and shift are those of FLUX.1), or a diffusers `vae` folder
            with `config.json` and `diffusion_pytorch_model.safetensors`.
        device: where the weights go.
        dtype: of the weights and of the computation.

    Raises:
        ValueError: not there, not safetensors, not this architecture, a configuration that is not
            implemented, quantised but for scaled float8, or values that `dtype` cannot hold.
    """
    try:
        stored = StoredAutoencoder(Path(path))
        state_dict = {name: stored.read(name, dtype).to(device) for name in stored.shapes}
    except (ValueError, OSError) as error:
        raise ValueError(f"encoder.autoencoder_path: {path}: {error}") from None
    with torch.device("meta"):
        autoencoder = Autoencoder(stored.args)
    autoencoder.load_state_dict(state_dict, assign=True)
    return autoencoder.requires_grad_(False).eval()


def autoencoder_geometry(path: str | Path) -> tuple[int, int]:
    """(latent channels, pixels per latent cell) of what `load_autoencoder` would load.

    Reads only the configuration and the safetensors header. Raises ValueError or OSError.
    """
    args = StoredAutoencoder(Path(path)).args
    return args.z_channels, args.downscale


@cache
def diffusers_names(args: AutoencoderArgs) -> dict[str, tuple[str, Shape]]:
    """Our name -> diffusers' name and shape, for every parameter; values are in equal order."""
    last = len(args.ch_mult) - 1

    def entry(name: str, shape: Shape) -> tuple[str, Shape]:
        matrix = re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", name)
        if level := re.match(r"decoder\.up\.(\d+)\.", name):
            name = f"decoder.up_blocks.{last - int(level[1])}.{name[level.end() :]}"
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        return name, shape[:2] if matrix else shape

    return {name: entry(name, shape) for name, shape in parameter_shapes(args).items()}


def to_diffusers(state_dict: Mapping[str, Tensor], args: AutoencoderArgs) -> dict[str, Tensor]:
    """A state dict of ours under diffusers' names and in its shapes."""
    names = diffusers_names(args)
    return {name: state_dict[own].reshape(shape) for own, (name, shape) in names.items()}


def _args_of_shapes(path: Path, shapes: Mapping[str, Shape]) -> AutoencoderArgs:
    """Architecture of a file in BFL's layout, from names and shapes of its tensors."""

    def count(pattern: str) -> int:
        return len({found[1] for name in shapes if (found := re.match(pattern, name))})

    try:
        ch, in_channels = shapes["encoder.conv_in.weight"][:2]
        _ = shapes["encoder.down.0.block.0.conv1.weight"]  # which diffusers' layout has not
        levels = count(r"encoder\.down\.(\d+)\.")
        widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
        return AutoencoderArgs(
            in_channels=in_channels,
            ch=ch,
            ch_mult=tuple(width // ch for width in widths),
            num_res_blocks=count(r"encoder\.down\.0\.block\.(\d+)\."),
            z_channels=shapes["decoder.conv_in.weight"][1],
            out_ch=shapes["decoder.conv_out.weight"][0],
        )
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{path} is not an autoencoder in BFL's layout ({error!r}); give ae.safetensors of "
            "FLUX.1, or a diffusers vae folder"
        ) from None


def _args_of_folder(folder: Path) -> AutoencoderArgs:
    """Architecture of a diffusers AutoencoderKL, from its config.json."""
    try:
        config = read_json(folder / "config.json")
        _check_supported(config)
        check_config(config)
        widths = config["block_out_channels"]
        return AutoencoderArgs(
            in_channels=config["in_channels"],
            ch=widths[0],
            ch_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=config["layers_per_block"],
            z_channels=config["latent_channels"],
            scale_factor=config["scaling_factor"],
            # null in autoencoders older than FLUX.1, which do not shift
            shift_factor=config.get("shift_factor") or 0.0,
            out_ch=config["out_channels"],
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        why = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(
            f"{folder} does not describe a FLUX autoencoder ({why}); give a diffusers vae "
            "folder with its config.json, or the file ae.safetensors itself"
        ) from None


def _check_supported(config: Mapping[str, Any]) -> None:
    """Refuse what AutoencoderKL can be and FLUX.1's autoencoder is not."""
    levels = len(config["block_out_channels"])
    supported = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "norm_num_groups": NORM_GROUPS,
        "mid_block_add_attention": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    # AutoencoderKL's defaults for what a configuration leaves out
    found = {**supported, "use_quant_conv": True, "use_post_quant_conv": True, **config}
    wrong = [
        f"{name} is {found[name]!r}, supported is {value!r}"
        for name, value in supported.items()
        if found[name] != value
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
