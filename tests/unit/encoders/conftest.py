"""The tiny encoders, and diffusers autoencoders to compare with."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

import torchtitan_flux
from torchtitan_flux.encoders.autoencoder import AutoencoderArgs

TINY = Path(torchtitan_flux.__file__).parent / "assets" / "tiny"


@pytest.fixture(scope="session")
def tiny() -> Path:
    """torchtitan_flux/assets/tiny."""
    return TINY


@pytest.fixture(scope="session")
def build_kl() -> Callable[[AutoencoderArgs], AutoencoderKL]:
    """Builds diffusers' autoencoder of a shape; every parameter random, none zero."""

    def build(args: AutoencoderArgs) -> AutoencoderKL:
        levels = len(args.ch_mult)
        kl = AutoencoderKL(
            in_channels=args.in_channels,
            out_channels=args.out_ch,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=args.widths,
            layers_per_block=args.num_res_blocks,
            latent_channels=args.z_channels,
            norm_num_groups=32,
            scaling_factor=args.scale_factor,
            shift_factor=args.shift_factor,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        rng = torch.Generator().manual_seed(7)
        for name, parameter in kl.requires_grad_(False).named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            noise = torch.randn(parameter.shape, generator=rng)
            parameter.copy_(start + noise / fan_in**0.5)
        return kl.eval()

    return build
