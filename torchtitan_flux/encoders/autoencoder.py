"""The FLUX.1 autoencoder as a codec, and loading it from a file of BFL's or a diffusers folder."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchtitan_flux.encoders.autoencoder_keys import layout_names, without_prefix
from torchtitan_flux.encoders.autoencoder_layers import (
    NORM_GROUPS,
    AutoencoderArgs,
    Decoder,
    Encoder,
    parameter_shapes,
)
from torchtitan_flux.encoders.codec import check_channels
from torchtitan_flux.paths import absence
from torchtitan_flux.tensor_files.element_types import BeyondRange
from torchtitan_flux.tensor_files.file_sets import weight_files
from torchtitan_flux.tensor_files.quantized import ScaledSource, check_config
from torchtitan_flux.tensor_files.safetensors_file import TensorsFile, read_json
from torchtitan_flux.tensor_files.sources import Box, FilesSource, RenamedSource, Source
from torchtitan_flux.tensor_files.state_dict_keys import KeyMismatch, Shape, check_keys

__all__ = ["Autoencoder", "AutoencoderArgs", "autoencoder_geometry", "load_autoencoder"]

_KEY = "encoder.autoencoder_path"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_LOGVAR_MIN, _LOGVAR_MAX = -30.0, 20.0


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
        `noise`, z = mean. ValueError: other channels, or a size that is no multiple of `downscale`.
        """
        check_channels("images", images, self.args.in_channels)
        if images.shape[2] % self.downscale or images.shape[3] % self.downscale:
            raise ValueError(
                f"images of {images.shape[2]}x{images.shape[3]} pixels: the autoencoder needs "
                f"multiples of {self.downscale}"
            )
        moments = self.encoder(images.to(self.encoder.conv_in.weight.dtype)).to(images.dtype)
        z, logvar = moments.chunk(2, dim=1)
        if noise is not None:
            logvar = logvar.clamp(_LOGVAR_MIN, _LOGVAR_MAX)
            z = z + torch.exp(0.5 * logvar) * noise.to(z)
        return self.args.scale_factor * (z - self.args.shift_factor)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b ch h w"]) -> Float[Tensor, "b c H W"]:
        """Images, nominally in [-1, 1] and not clipped, in the dtype of `latents`."""
        check_channels("latents", latents, self.channels)
        z = latents / self.args.scale_factor + self.args.shift_factor
        return self.decoder(z.to(self.decoder.conv_in.weight.dtype)).to(latents.dtype)


class StoredAutoencoder(Source):
    """The weights of an autoencoder where they lie, under our names; every key is accounted for.

    `args` is its architecture. Raises FileNotFoundError or ValueError, see `load_autoencoder`.
    """

    def __init__(self, path: Path) -> None:
        file = path
        if path.is_dir():
            file = weights_in(path)
            self.args = _args_of_folder(path, file)
        elif not path.is_file():
            raise FileNotFoundError(
                f"{path} {absence(path)}; give BFL's ae.safetensors or a diffusers vae folder"
            )
        stored = FilesSource([TensorsFile.open(file)])
        named = RenamedSource(stored, without_prefix({name: name for name in stored.shapes}))
        if not path.is_dir():
            self.args = _args_of_shapes(path, named.shapes)
        self._source = ScaledSource(named, file)
        names = layout_names("diffusers" if path.is_dir() else "bfl", self.args)
        check_keys(self._source.shapes, dict(names.values()), str(file))
        self._names = {own: name for own, (name, _) in names.items()}
        self.dtypes = {own: self._source.dtypes[name] for own, name in self._names.items()}
        self.shapes = parameter_shapes(self.args)

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
            with `config.json` and `diffusion_pytorch_model.safetensors`; all names may stand behind
            a prefix.
        device: where the weights go.
        dtype: of the weights and of the computation.

    Raises:
        FileNotFoundError: nothing there, or a folder that lacks one of the two files.
        ValueError: not safetensors, not this architecture (KeyMismatch names the keys), a
            configuration this code does not implement, or quantised but for scaled float8.
    """
    with _naming_key(path):
        stored = StoredAutoencoder(Path(path))
        state_dict = {name: stored.read(name, dtype).to(device) for name in stored.shapes}
    with torch.device("meta"):
        autoencoder = Autoencoder(stored.args)
    autoencoder.load_state_dict(state_dict, assign=True)
    return autoencoder.requires_grad_(False).eval()


def autoencoder_geometry(path: str | Path) -> tuple[int, int]:
    """(latent channels, pixels per latent cell) of what `load_autoencoder` would load.

    Reads only the configuration and the safetensors header. Raises as `load_autoencoder` does, but
    where a value does not fit.
    """
    with _naming_key(path):
        args = StoredAutoencoder(Path(path)).args
    return args.z_channels, args.downscale


@contextmanager
def _naming_key(path: str | Path) -> Iterator[None]:
    """Messages begin with the TOML key."""
    try:
        yield
    except KeyMismatch as error:
        what = f"{_KEY}: {path}"
        raise KeyMismatch(what, error.missing, error.unknown, error.mis_shaped) from None
    except BeyondRange as error:
        raise ValueError(f"{_KEY}: {path}: {error}") from None
    except (ValueError, FileNotFoundError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{_KEY}: {error}") from None


def weights_in(folder: Path) -> Path:
    """The weights in a diffusers folder: a variant, such as fp16, where it is the only one."""
    stem = _WEIGHTS.partition(".")[0]
    found = [one for one in weight_files(folder) if one.stem == stem and one.count == 1]
    return folder / (found[0].names[0] if len(found) == 1 else _WEIGHTS)


def _args_of_shapes(path: Path, shapes: Mapping[str, Shape]) -> AutoencoderArgs:
    """Architecture of a file in BFL's layout, from names and shapes of its tensors."""

    def count(pattern: str) -> int:
        return len({found[1] for name in shapes if (found := re.match(pattern, name))})

    try:
        ch, in_channels = shapes["encoder.conv_in.weight"][:2]
        levels = count(r"encoder\.down\.(\d+)\.")
        widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
        return AutoencoderArgs(
            in_channels=in_channels,
            ch=ch,
            ch_mult=_multiples(widths, ch),
            num_res_blocks=count(r"encoder\.down\.0\.block\.(\d+)\."),
            z_channels=shapes["decoder.conv_in.weight"][1],
            out_ch=shapes["decoder.conv_out.weight"][0],
        )
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{path} is not an autoencoder in BFL's layout ({error}); give ae.safetensors of "
            "FLUX.1, or a diffusers vae folder with its config.json"
        ) from None


def _args_of_folder(folder: Path, weights: Path) -> AutoencoderArgs:
    """Architecture of a diffusers AutoencoderKL, from its config.json."""
    path = folder / "config.json"
    for file in (path, weights):
        if not file.is_file():
            raise FileNotFoundError(
                f"the folder {folder} has no {file.name}; give a diffusers vae folder, or the file "
                "ae.safetensors itself"
            )
    try:
        config = read_json(path)
        _check_supported(config)
        check_config(config)
        widths = config["block_out_channels"]
        return AutoencoderArgs(
            in_channels=config["in_channels"],
            ch=widths[0],
            ch_mult=_multiples(widths, widths[0]),
            num_res_blocks=config["layers_per_block"],
            z_channels=config["latent_channels"],
            scale_factor=config["scaling_factor"],
            # null in autoencoders older than FLUX.1, which do not shift
            shift_factor=config.get("shift_factor") or 0.0,
            out_ch=config["out_channels"],
        )
    except KeyError as error:
        raise ValueError(f"{path} has no entry {error}; not an AutoencoderKL?") from None
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} does not describe a FLUX autoencoder: {error}") from None


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


def _multiples(widths: list[int], ch: int) -> tuple[int, ...]:
    if any(width % ch for width in widths):
        raise ValueError(f"level widths {widths} are not multiples of the first, {ch}")
    return tuple(width // ch for width in widths)
