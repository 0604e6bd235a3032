"""A picture of the grid that is not finite is black and said so; the run goes on."""

import logging
from unittest.mock import MagicMock

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torch import nn
from torchtitan.tools.logging import logger

from torchtitan_flux.encoders.codec import PixelCodec
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.model.inputs import TextConditioning
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.sampling.generate import SampleSettings
from torchtitan_flux.training.conditioning import FrozenEncoders
from torchtitan_flux.training.image_sampler import ImageSampler

GEOMETRY = FLAVORS["flux-tiny"].geometry
PROMPTS = ["a", "bad", "b", "bad", "worse"]


class Breaks(nn.Module):
    """Not finite where the caption says so: from the third step on, or once decoded."""

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y, guidance):
        bad = (y[:, :1] == 3) & (timesteps[:, None] < 0.7)
        return torch.where(bad[:, :, None], torch.inf, img)


class Overflows(PixelCodec):
    worse: list[bool]

    def decode(self, latents):
        decoded = super().decode(latents).clone()
        decoded[self.worse, 1, 0, 1] = torch.inf
        return decoded


def test_broken_pictures_are_black_and_named(monkeypatch):
    codec = Overflows(16)

    def encode(captions):
        length = torch.tensor([[float(len(caption))] for caption in captions])
        codec.worse = [len(caption) == 5 for caption in captions]
        return TextConditioning(length[:, None], length)

    encoders = MagicMock(spec=FrozenEncoders)
    encoders.codec, encoders.encode_captions, encoders.device = codec, encode, torch.device("cpu")
    dims = MagicMock(spec=FluxParallelDims, data_degree=1, data_rank=0, data_group=None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(f"{record.levelname} {record.getMessage()}")
    logger.addHandler(handler)
    try:
        sampler = ImageSampler(Breaks(), encoders, GEOMETRY, dims, batch_size=2)
        images = sampler.sample(PROMPTS, SampleSettings(ImageSize(16, 16), steps=5))
    finally:
        logger.removeHandler(handler)
    assert images.isfinite().all()
    assert [bool((image == -1).all()) for image in images] == [False, True, False, True, True]
    assert said == [
        "ERROR Picture 1 of 'bad' is not finite; it is drawn black",
        "ERROR Picture 3 of 'bad' is not finite; it is drawn black",
        "ERROR Picture 4 of 'worse' is not finite; it is drawn black",
    ]
