"""Small real parts for the tests of `data`: sources without sklearn, a byte tokenizer."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from torchtitan_flux.data.samples import TrainingSamples, ValidationSamples
from torchtitan_flux.data.sources.source import Item, UnreadableItem
from torchtitan_flux.flow_matching import TimeDensity
from torchtitan_flux.latents import Geometry, ImageSize

SIZE = ImageSize(6, 10)
GEOMETRY = Geometry(channels=3, downscale=1, patch=2)


class GraySource:
    """`length` gray ramps of 14 x 7 pixels, from i to i + 104; SIZE has to crop them.

    `images` makes those of some indices instead.
    """

    name = "grays"

    def __init__(
        self,
        length: int,
        unreadable: frozenset[int] = frozenset(),
        images: dict[int, Callable[[], Image.Image]] | None = None,
    ):
        self.length = length
        self.unreadable = unreadable
        self.images = images or {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        if index in self.unreadable:
            raise UnreadableItem(f"grays/{index}", "made so")
        columns = 8 * np.arange(14, dtype=np.uint8) + index % 100
        pixels = np.broadcast_to(columns, (7, 14)).copy()
        image = self.images.get(index, lambda: Image.fromarray(pixels))()
        return Item(image, (f"gray {index}", f"no. {index}"), f"grays/{index}")


def byte_tokens(caption: str) -> tuple[torch.Tensor, torch.Tensor]:
    """UTF-8 bytes, zero-padded to 11 and 77."""
    codes = caption.encode()[:11]
    t5, clip = np.zeros(11, np.int64), np.zeros(77, np.int64)
    t5[: len(codes)] = clip[: len(codes)] = list(codes)
    return torch.from_numpy(t5), torch.from_numpy(clip)


@pytest.fixture
def refused(monkeypatch) -> set[str]:
    """Names of files and folders that the operating system does not open: root may open all."""
    names: set[str] = set()

    def refusing(real):
        def call(path, *args, **options):
            if os.path.basename(path) in names:
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return real(path, *args, **options)

        return call

    for owner, name in ((os, "scandir"), (Path, "open"), (Path, "read_bytes")):
        monkeypatch.setattr(owner, name, refusing(getattr(owner, name)))
    return names


@pytest.fixture
def make_source() -> Callable[..., GraySource]:
    return GraySource


COMMON = {
    "seed": 5,
    "size": SIZE,
    "geometry": GEOMETRY,
    "channels": 3,
    "tokenize": byte_tokens,
    "stochastic": True,
}


@pytest.fixture
def make_samples() -> Callable[..., TrainingSamples]:
    def make(length: int = 7, cls=TrainingSamples, **changes):
        options = COMMON | {
            "source": GraySource(length),
            "time_density": TimeDensity(),
            "dropout_prob": 0.5,
            "dropout_mode": "independent",
            "flip_prob": 0.5,
        }
        return cls(**(options | changes))

    return make


@pytest.fixture
def make_validation() -> Callable[..., ValidationSamples]:
    def make(length: int = 7, **changes):
        return ValidationSamples(**({"source": GraySource(length)} | COMMON | changes))

    return make
