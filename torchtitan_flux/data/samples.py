"""From a position of the run to a training sample, from an index to a validation sample.

Contract 1: everything random about a training sample is a function of (run seed, stream, position)
and never of the item, so that the same picture meets a fresh time, noise, crop, caption and
dropout in every epoch. Validation is the opposite: its noise belongs to the item.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchtitan_flux.data.colours import in_srgb
from torchtitan_flux.data.decode import damage_is_unreadable
from torchtitan_flux.data.order import Order
from torchtitan_flux.data.reused_generator import generator
from torchtitan_flux.data.sources.source import Item, Source, UnreadableItem
from torchtitan_flux.data.transforms import (
    CENTER,
    PLAIN_RULES,
    Picture,
    PictureRules,
    TooSmall,
    fit,
    load_picture,
    needs_crop,
)
from torchtitan_flux.flow_matching import TimeDensity, standard_normal
from torchtitan_flux.latents import Geometry, ImageSize
from torchtitan_flux.randomness import Stream

MAX_CHOICES = 16
"""Items tried for one position before the source counts as broken."""

Tokenize = Callable[[str], tuple[Tensor, Tensor]]
"""caption -> (T5 token ids int64 [L], CLIP token ids int64 [77]); remembers repeated captions."""


class Replacement(NamedTuple):
    """An item that could not be read: where it was wanted, which one it was, and why.

    `position` is the position of the run; for validation, the index in the held-out set.
    """

    position: int
    item_id: str
    reason: str


@dataclass(frozen=True)
class CaptionDropout:
    """How often text is replaced by the encoding of "", which guidance is trained with.

    Attributes:
        prob: probability in [0, 1].
        mode: "joint" drops both encodings together; "independent" drops the T5 and the CLIP
            encoding each with its own draw, as torchtitan's FLUX does.
    """

    prob: float = 0.0
    mode: str = "joint"

    def __post_init__(self):
        if not 0 <= self.prob <= 1:
            raise ValueError(f"the probability of caption dropout is {self.prob}, not in [0, 1]")
        if self.mode not in ("joint", "independent"):
            raise ValueError(f"caption dropout is joint or independent, not {self.mode!r}")


class TrainingSamples:
    """The map from a position of the run to its training sample.

    Args:
        source: items to train on.
        order: which item stands at a position; made for `len(source)`.
        seed: the run's seed.
        size: size of the training images in pixels.
        geometry: how images of `size` become latents and tokens.
        channels: image channels, 1 or 3.
        tokenize: caption -> (T5 token ids [L], CLIP token ids [77]).
        time_density: maps a uniform draw to a time.
        dropout: how often captions are dropped.
        flip_prob: probability of mirroring left and right.
        rules: background of transparent pictures, least size.
        stochastic: the codec samples a posterior, so samples carry `posterior_noise`.

    A sample is a dictionary of tensors:
        image: float32 [channels, H, W] in [-1, 1].
        t5_tokens, clip_tokens: int64 [L] and [77].
        t: float32 [], time; 0 is data, 1 is noise.
        noise: float32, of the shape of the latents.
        posterior_noise: the same shape; only when stochastic.
        position: int64 [].

    Items that could not be read are appended to `replaced`.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        seed: int,
        size: ImageSize,
        geometry: Geometry,
        channels: int,
        tokenize: Tokenize,
        time_density: TimeDensity,
        dropout: CaptionDropout,
        *,
        flip_prob: float = 0.0,
        rules: PictureRules = PLAIN_RULES,
        stochastic: bool,
    ):
        if order.length != len(source):
            raise ValueError(f"the order is for {order.length} items, the source has {len(source)}")
        self.source = source
        self.order = order
        self.seed = seed
        self.size = size
        self.rules = rules
        self.channels = channels
        self.time_density = time_density
        self.dropout = dropout
        self.flip_prob = flip_prob
        self.stochastic = stochastic
        self.replaced: list[Replacement] = []
        self._latent_shape = geometry.latent_shape(size)
        self._image_tokens = geometry.grid(size).tokens
        self._tokens = tokenize

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        item, image = self.picture(position)
        t5_tokens, clip_tokens = self._text(item, position)
        sample = {
            "image": image,
            "t5_tokens": t5_tokens,
            "clip_tokens": clip_tokens,
            "t": self._time(position),
            "noise": standard_normal(self._rng(Stream.NOISE, position), self._latent_shape),
            "position": torch.tensor(position),
        }
        if self.stochastic:
            rng = self._rng(Stream.POSTERIOR, position)
            sample["posterior_noise"] = standard_normal(rng, self._latent_shape)
        return sample

    def _rng(self, stream: Stream, position: int) -> np.random.Generator:
        return generator(self.seed, stream, position)

    def picture(self, position: int) -> tuple[Item, Tensor]:
        """The first choice for the position that can be read, and its image [channels, H, W]."""
        failures = []
        for choice in range(MAX_CHOICES):
            try:
                item = self.source[self.order.item(position, choice)]
                image = self.image(item, position)
            except UnreadableItem as error:
                failures.append(Replacement(position, error.item_id, error.reason))
                continue
            self.replaced += failures
            return item, image
        last = failures[-1]
        raise RuntimeError(
            f"none of {MAX_CHOICES} items of {self.source.name!r} tried for position {position} "
            f"can be read; the last one was {last.item_id}: {last.reason}"
        )

    def image(self, item: Item, position: int) -> Tensor:
        """The image [channels, H, W] that an item is at a position; UnreadableItem when damaged."""
        with damage_is_unreadable(item.item_id):
            picture = _picture(item, self.size, self.rules)
            crop, flip = CENTER, False
            if needs_crop(picture, self.size):
                x, y = self._rng(Stream.CROP, position).random(2)
                crop = (x, y)
            if self.flip_prob:
                flip = self._rng(Stream.FLIP, position).random() < self.flip_prob
            background = self.rules.background
            return torch.from_numpy(fit(picture, self.size, self.channels, crop, flip, background))

    def caption(self, item: Item, position: int) -> str:
        """The one of an item's captions that stands at a position, before any is dropped."""
        if len(item.captions) == 1:
            return item.captions[0]
        return item.captions[self._rng(Stream.CAPTION, position).integers(len(item.captions))]

    def _text(self, item: Item, position: int) -> tuple[Tensor, Tensor]:
        t5_tokens, clip_tokens = self._tokens(self.caption(item, position))
        if self.dropout.prob:
            drop = self._rng(Stream.DROPOUT, position).random(2) < self.dropout.prob
            drop_t5, drop_clip = drop if self.dropout.mode == "independent" else (drop[0], drop[0])
            if drop_t5 or drop_clip:
                empty_t5, empty_clip = self._tokens("")
                t5_tokens = empty_t5 if drop_t5 else t5_tokens
                clip_tokens = empty_clip if drop_clip else clip_tokens
        return t5_tokens, clip_tokens

    def _time(self, position: int) -> Tensor:
        # The draw is in [0, 1); the density's inverse CDF wants (0, 1).
        u = max(self._rng(Stream.TIME, position).random(), 2.0**-53)
        t = self.time_density.times(np.array([u]), self._image_tokens)
        return torch.tensor(t[0], dtype=torch.float32)


class ValidationSamples:
    """The map from an index of a held-out set to its validation sample, the same in every run.

    Centre crop, no flip, no dropout, the first caption; noise is a function of (validation seed,
    stream, item id). Arguments are those of `TrainingSamples`, except `seed`, the validation seed.

    A sample holds what a training sample holds, without `t` and `position` (times come from the
    validation grid), and:
        index: int64 [].
        weight: float32 [], 1; 0 for an item that cannot be read (its image is all zero), which
            is then listed in `replaced`.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        size: ImageSize,
        geometry: Geometry,
        channels: int,
        tokenize: Tokenize,
        *,
        rules: PictureRules = PLAIN_RULES,
        stochastic: bool,
    ):
        self.source = source
        self.seed = seed
        self.size = size
        self.rules = rules
        self.channels = channels
        self.stochastic = stochastic
        self.replaced: list[Replacement] = []
        self._latent_shape = geometry.latent_shape(size)
        self._tokens = tokenize

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        try:
            item = self.source[index]
            with damage_is_unreadable(item.item_id):
                picture = _picture(item, self.size, self.rules)
                background = self.rules.background
                image = torch.from_numpy(
                    fit(picture, self.size, self.channels, background=background)
                )
            item_id, caption, weight = item.item_id, item.captions[0], 1.0
        except UnreadableItem as error:
            # No substitute: it would count twice. The set gets smaller by one instead.
            self.replaced.append(Replacement(index, error.item_id, error.reason))
            image = torch.zeros(self.channels, self.size.height, self.size.width)
            item_id, caption, weight = error.item_id, "", 0.0
        t5_tokens, clip_tokens = self._tokens(caption)
        sample = {
            "image": image,
            "t5_tokens": t5_tokens,
            "clip_tokens": clip_tokens,
            "noise": self._normal(Stream.NOISE, item_id),
            "index": torch.tensor(index),
            "weight": torch.tensor(weight),
        }
        if self.stochastic:
            sample["posterior_noise"] = self._normal(Stream.POSTERIOR, item_id)
        return sample

    def _normal(self, stream: Stream, item_id: str) -> Tensor:
        # the prefix keeps an item called "17" apart from position 17 of a run with this seed
        rng = generator(self.seed, stream, f"item/{item_id}")
        return standard_normal(rng, self._latent_shape)


def _picture(item: Item, size: ImageSize, rules: PictureRules) -> Picture:
    """The decoded picture of an item; UnreadableItem when it is damaged or too small."""
    try:
        rules.check(item.image)
    except TooSmall as error:
        raise UnreadableItem(item.item_id, str(error)) from error
    picture = load_picture(item.image, size)
    return picture._replace(image=in_srgb(picture.image)) if rules.srgb else picture
