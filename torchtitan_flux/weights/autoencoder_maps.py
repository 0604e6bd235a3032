"""Formats of the autoencoder's weights: BFL's `ae.safetensors` and diffusers' AutoencoderKL."""

from torchtitan_flux.encoders.autoencoder_keys import (
    from_bfl,
    from_diffusers,
    to_bfl,
    to_diffusers,
)

__all__ = ["from_bfl", "from_diffusers", "to_bfl", "to_diffusers"]
