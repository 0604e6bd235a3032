"""The codec protocol and the identity codec."""

import pytest
import torch

from torchtitan_flux.encoders.autoencoder import Autoencoder, AutoencoderArgs
from torchtitan_flux.encoders.codec import Codec, PixelCodec


def test_pixel_codec_is_the_identity():
    codec = PixelCodec(3)
    images = torch.rand(2, 3, 5, 7)
    assert (codec.channels, codec.downscale, codec.stochastic) == (3, 1, False)
    assert torch.equal(codec.encode(images), images)
    assert torch.equal(codec.encode(images, torch.randn(2, 3, 5, 7)), images)
    assert torch.equal(codec.decode(images), images)


def test_both_codecs_follow_the_protocol():
    with torch.device("meta"):
        autoencoder = Autoencoder(AutoencoderArgs())
    assert isinstance(PixelCodec(1), Codec)
    assert isinstance(autoencoder, Codec)
    assert (autoencoder.channels, autoencoder.downscale, autoencoder.stochastic) == (16, 8, True)


def test_other_channels_are_refused():
    codec, grey = PixelCodec(3), torch.zeros(2, 1, 5, 7)
    with pytest.raises(ValueError, match=r"images of shape \(batch, 3, .*got \(2, 1, 5, 7\)"):
        codec.encode(grey)
    with pytest.raises(ValueError, match=r"latents of shape \(batch, 3, .*got \(2, 1, 5, 7\)"):
        codec.decode(grey)
