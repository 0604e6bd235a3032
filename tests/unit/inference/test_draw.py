"""Drawing with parts of one line each: what is not finite, chunks."""

from contextlib import contextmanager
from dataclasses import replace

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
from torch import nn

from torchtitan_flux.encoders.codec import PixelCodec
from torchtitan_flux.inference.draw import MAX_IMAGES_PER_CHUNK, NotFinite, Stages, draw
from torchtitan_flux.inference.picture import Picture
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.model.inputs import TextConditioning
from torchtitan_flux.sampling.generate import SampleSettings

GEOMETRY = FLAVORS["flux-tiny"].geometry
SETTINGS = SampleSettings(ImageSize(16, 16), steps=2, seed=5)


def picture(prompt: str, index: int, **changes: int) -> Picture:
    return Picture(prompt, "", replace(SETTINGS, **changes), index)


class CaptionVelocity(nn.Module):
    """A velocity that depends on the caption."""

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y, guidance):
        return img * y[:, None, :1]


class Overflows(PixelCodec):
    def decode(self, latents):
        decoded = super().decode(latents)
        decoded[0, 0, 0, 0] = torch.inf
        return decoded


def stages(sequential: bool, codec: PixelCodec, log: list[str] | None = None) -> Stages:
    """Parts that log what is done with them."""
    log = [] if log is None else log

    def encode(captions):
        log.append("caption")
        length = torch.tensor([[float(len(caption))] for caption in captions])
        return TextConditioning(length[:, None].clamp(max=99) / 99, length / 99)

    def part(name, value):
        @contextmanager
        def opened():
            log.append(name)
            yield value

        return opened

    return Stages(
        part("text", encode),
        part("transformer", CaptionVelocity()),
        part("codec", codec),
        torch.device("cpu"),
        sequential,
    )


@pytest.mark.parametrize("sequential", [True, False])
def test_what_is_not_finite_is_named(sequential):
    batches = [[picture("a", 0), picture("b", 1)]]
    with pytest.raises(NotFinite, match="'a' is not finite"):
        list(draw(stages(sequential, Overflows(16)), GEOMETRY, batches))


@pytest.mark.parametrize("batch", [2, 3 * MAX_IMAGES_PER_CHUNK])
def test_many_pictures_go_through_sequential_stages_in_chunks(batch):
    """Memory and the wait for the first picture do not grow with their number."""
    count = 2 * MAX_IMAGES_PER_CHUNK + 4
    requests = [picture("x" * (1 + i), i) for i in range(count)]
    batches = [requests[i : i + batch] for i in range(0, count, batch)]
    found, steps, log = {}, {True: [], False: []}, []
    for sequential in (True, False):
        parts = stages(sequential, PixelCodec(16), log if sequential else None)
        images = draw(parts, GEOMETRY, batches, steps[sequential].append)
        first = next(images)
        if sequential:
            chunk = max(batch, MAX_IMAGES_PER_CHUNK) if batch == 2 else count
            assert log == ["text", *["caption"] * chunk, "transformer", "codec"]
        found[sequential] = torch.cat([first, *images])
    assert torch.equal(found[True], found[False])
    assert len({tuple(image.flatten().tolist()) for image in found[True]}) == count
    assert steps[True] == steps[False] == [len(one) for one in batches for _ in range(2)]
    assert log.count("text") == log.count("codec") == (3 if batch == 2 else 1)
