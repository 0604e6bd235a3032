"""From a position of the run to a training sample, from an index to a validation sample.

Contract 1: everything random about a training sample is a function of (run seed, stream, position)
and never of the item, so that the same picture meets a fresh time, noise, crop, caption and
dropout in every epoch. Validation is the opposite: its noise belongs to the item.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from torchtitan_flux.data.batch import Pixels, Replacement, Tokens, TrainingBatch, ValidationBatch
from torchtitan_flux.data.decode import damage_is_unreadable
from torchtitan_flux.data.order import Order
from torchtitan_flux.data.sources.source import Item, Source, UnreadableItem
from torchtitan_flux.data.transforms import CENTER, WHITE, to_training_image
from torchtitan_flux.flow_matching import TimeDensity, standard_normal
from torchtitan_flux.latents import Geometry, ImageSize
from torchtitan_flux.randomness import Stream, generator

MAX_CHOICES = 16
"""Items tried for one position before the source counts as broken."""

Tokenize = Callable[[str], tuple[Tensor, Tensor]]
"""caption -> (T5 token ids int64 [L], CLIP token ids int64 [77]); remembers repeated captions."""


@dataclass(kw_only=True)
class _Samples:
    """What training and validation samples are made with.

    Attributes:
        seed: the run's; of validation, its own.
        size: of the images in pixels; ask `size_at`, which buckets of sizes would change.
        channels: of the images, 1 or 3.
        stochastic: the codec samples a posterior, so samples carry `posterior_noise`.
        background: red, green and blue, 0 to 255, behind transparent parts.
        min_size: pixels that the shorter side of a picture must have.
        srgb: embedded ICC profiles are applied.
    """

    source: Source
    seed: int
    size: ImageSize
    geometry: Geometry
    channels: int
    tokenize: Tokenize
    stochastic: bool
    background: tuple[int, int, int] = WHITE
    min_size: int = 1
    srgb: bool = False

    def size_at(self, position: int) -> ImageSize:
        """Size of the image at a position; the same for all positions of a step."""
        return self.size

    def _fitted(
        self,
        item: Item,
        size: ImageSize,
        crop: tuple[float, float] = CENTER,
        flip: bool = False,
    ) -> Float32[Tensor, "c H W"]:
        """The item's image for training; UnreadableItem when it is damaged or too small."""
        with damage_is_unreadable(item.item_id):
            (width, height), least = item.image.size, self.min_size  # from the header alone
            if min(width, height) < least:
                what = f"too small: {width} x {height} pixels, data.min_image_size = {least}"
                raise UnreadableItem(item.item_id, what)
            image = to_training_image(
                item.image, size, self.channels, crop, flip, self.background, self.srgb
            )
            return torch.from_numpy(image)

    def _noise(
        self, index: int | str, size: ImageSize
    ) -> tuple[Float32[Tensor, "ch h w"], Float32[Tensor, "ch h w"] | None]:
        """Noise and posterior noise, at addresses of this index."""
        shape = self.geometry.latent_shape(size)
        noise = standard_normal(generator(self.seed, Stream.NOISE, index), shape)
        if not self.stochastic:
            return noise, None
        return noise, standard_normal(generator(self.seed, Stream.POSTERIOR, index), shape)


@dataclass(kw_only=True)
class TrainingSamples(_Samples):
    """The map from a position of the run to its training sample.

    Attributes:
        order: which item stands at a position.
        time_density: maps a uniform draw to a time.
        dropout_prob: how often text is replaced by the encoding of "", which guidance needs.
        dropout_mode: "joint" drops both encodings together; "independent" drops the T5 and the CLIP
            encoding each with its own draw, as torchtitan's FLUX does.
        flip_prob: probability of mirroring left and right.
    """

    order: Order = field(init=False)
    time_density: TimeDensity
    dropout_prob: float = 0.0
    dropout_mode: Literal["joint", "independent"] = "joint"
    flip_prob: float = 0.0

    def __post_init__(self):
        self.order = Order(self.seed, len(self.source))

    def __getitem__(self, position: int) -> TrainingBatch:
        item, image, replaced = self.picture(position)
        noise, posterior_noise = self._noise(position, self.size_at(position))
        return TrainingBatch(
            picture=Pixels(image, posterior_noise),
            text=self.tokens(item, position),
            noise=noise,
            position=torch.tensor(position),
            replaced=replaced,
            t=self._time(position),
        )

    def _rng(self, stream: Stream, position: int) -> np.random.Generator:
        return generator(self.seed, stream, position)

    def picture(self, position: int) -> tuple[Item, Float32[Tensor, "c H W"], list[Replacement]]:
        """The first choice for the position that can be read, its image, and those before it."""
        failures: list[Replacement] = []
        for choice in range(MAX_CHOICES):
            try:
                item = self.source[self.order.item(position, choice)]
                return item, self.image(item, position), failures
            except UnreadableItem as error:
                failures.append(Replacement(position, error.item_id, error.reason))
        last = failures[-1]
        raise RuntimeError(
            f"none of {MAX_CHOICES} items of {self.source.name!r} tried for position {position} "
            f"can be read; the last one was {last.item_id}: {last.reason}"
        )

    def image(self, item: Item, position: int) -> Float32[Tensor, "c H W"]:
        """The image that an item is at a position; UnreadableItem when damaged."""
        x, y = self._rng(Stream.CROP, position).random(2)
        flip = self._rng(Stream.FLIP, position).random() < self.flip_prob
        return self._fitted(item, self.size_at(position), (x, y), flip)

    def caption(self, item: Item, position: int) -> str:
        """The one of an item's captions that stands at a position, before any is dropped."""
        if len(item.captions) == 1:
            return item.captions[0]
        return item.captions[self._rng(Stream.CAPTION, position).integers(len(item.captions))]

    def tokens(self, item: Item, position: int) -> Tokens:
        """The caption at a position for both encoders, dropped or not."""
        t5, clip = self.tokenize(self.caption(item, position))
        if self.dropout_prob:
            drop = self._rng(Stream.DROPOUT, position).random(2) < self.dropout_prob
            drop_t5, drop_clip = drop if self.dropout_mode == "independent" else (drop[0], drop[0])
            if drop_t5 or drop_clip:
                empty_t5, empty_clip = self.tokenize("")
                t5, clip = empty_t5 if drop_t5 else t5, empty_clip if drop_clip else clip
        return Tokens(t5, clip)

    def _time(self, position: int) -> Tensor:
        # The draw is in [0, 1); the density's inverse CDF wants (0, 1).
        u = max(self._rng(Stream.TIME, position).random(), 2.0**-53)
        tokens = self.geometry.grid(self.size_at(position)).tokens
        return torch.tensor(self.time_density.times(np.array([u]), tokens)[0], dtype=torch.float32)


@dataclass(kw_only=True)
class ValidationSamples(_Samples):
    """The map from an index of a held-out set to its validation sample, the same in every run.

    Centre crop, no flip, no dropout, the first caption; noise is a function of (validation seed,
    stream, item id). An item that cannot be read is an empty image that weighs nothing, and so are
    repeats, at indices from `len` on.
    """

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> ValidationBatch:
        is_repeat, index = index >= len(self), index % len(self)
        size, unreadable = self.size_at(index), []
        try:
            item = self.source[index]
            image = self._fitted(item, size)
            item_id, caption = item.item_id, item.captions[0]
        except UnreadableItem as error:
            # No substitute: it would count twice. The set gets smaller by one instead.
            unreadable = [Replacement(index, error.item_id, error.reason)]
            image = torch.zeros(self.channels, size.height, size.width)
            item_id, caption = error.item_id, ""
        # the prefix keeps an item called "17" apart from position 17 of a run with this seed
        noise, posterior_noise = self._noise(f"item/{item_id}", size)
        return ValidationBatch(
            picture=Pixels(image, posterior_noise),
            text=Tokens(*self.tokenize(caption)),
            noise=noise,
            position=torch.tensor(index),
            replaced=unreadable,
            weight=torch.tensor(float(not unreadable and not is_repeat)),
        )
