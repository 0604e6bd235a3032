"""Pixels, latents, packed tokens: inverse maps, diffusers' order, sizes that are refused."""

import pytest
import torch
from diffusers import FluxPipeline

from torchtitan_flux.latents import (
    Geometry,
    ImageSize,
    TokenGrid,
    image_ids,
    pack,
    text_ids,
    unpack,
)

FLUX = Geometry(channels=16, downscale=8, patch=2)


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_unpack_is_the_inverse_of_pack(patch):
    b, c, rows, cols = 2, 7, 5, 11
    latents = torch.arange(b * c * rows * cols * patch**2).float()
    latents = latents.reshape(b, c, rows * patch, cols * patch)
    packed = pack(latents, patch)
    assert packed.shape == (b, rows * cols, c * patch**2)
    assert torch.equal(unpack(packed, TokenGrid(rows, cols), patch), latents)


def test_pack_is_diffusers_pack():
    latents = torch.randn(3, 5, 14, 22, generator=torch.Generator().manual_seed(0))
    theirs = FluxPipeline._pack_latents(latents, 3, 5, 14, 22)
    assert torch.equal(pack(latents, 2), theirs)
    unpacked = FluxPipeline._unpack_latents(theirs, 14 * 8, 22 * 8, vae_scale_factor=8)
    assert torch.equal(unpack(theirs, TokenGrid(7, 11), 2), unpacked)


def test_ids_are_those_of_the_pipeline():
    ids = image_ids(TokenGrid(5, 7), batch=2)
    assert ids.shape == (2, 35, 3)
    assert ids.dtype == torch.float32
    theirs = FluxPipeline._prepare_latent_image_ids(2, 5, 7, "cpu", torch.float32)
    assert torch.equal(ids[0], theirs)
    assert torch.equal(ids[1], theirs)
    assert ids[0, 7 * 3 + 4].tolist() == [0, 3, 4]
    text = text_ids(9, batch=2)
    assert text.shape == (2, 9, 3)
    assert text.dtype == torch.float32
    assert text.abs().max() == 0


def test_geometry_of_flux():
    size = ImageSize(height=768, width=1024)
    assert FLUX.pixels_per_token == 16
    assert FLUX.token_features == 64
    assert FLUX.latent_shape(size) == (16, 96, 128)
    assert FLUX.grid(size) == TokenGrid(rows=48, cols=64)
    assert FLUX.grid(size).tokens == 3072
    pixels = Geometry(channels=3, downscale=1, patch=2)
    assert pixels.latent_shape(ImageSize(8, 6)) == (3, 8, 6)
    assert pixels.grid(ImageSize(8, 6)) == TokenGrid(4, 3)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((250, 256), "height 250 .* multiple of 16 .* downscale 8 x patch 2"),
        ((256, 8), "width 8 "),
        ((0, 256), "height 0 "),
        ((-16, 256), "height -16 "),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, message):
    for use in (FLUX.check, FLUX.grid, FLUX.latent_shape):
        with pytest.raises(ValueError, match=message):
            use(ImageSize(*size))


def test_image_size_is_written_in_several_ways():
    assert ImageSize.of(64) == ImageSize.of((64, 64)) == ImageSize(64, 64)
    assert ImageSize.of((48, 112)) == ImageSize(height=48, width=112)
    assert ImageSize.of(ImageSize(1, 2)) == ImageSize(1, 2)
    assert str(ImageSize(48, 112)) == "48x112"
