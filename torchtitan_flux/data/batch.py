"""Samples and batches. A batch has the fields of a sample, stacked along a new first axis `b`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.utils.data import default_collate

from torchtitan_flux.model.inputs import TextConditioning

T = TypeVar("T")


class Replacement(NamedTuple):
    """An item that could not be read: where it was wanted, which one it was, and why.

    `position` is the position of the run; for validation, the index in the held-out set.
    """

    position: int
    item_id: str
    reason: str


@dataclass(frozen=True)
class Pixels:
    """What the codec encodes: images in [-1, 1], and the noise that samples its posterior."""

    image: Float32[Tensor, "*b c H W"]
    posterior_noise: Float32[Tensor, "*b ch h w"] | None = None


@dataclass(frozen=True)
class Latents:
    """What the codec has made of images before."""

    latents: Float[Tensor, "*b ch h w"]


@dataclass(frozen=True)
class Tokens:
    """What the text encoders take."""

    t5: Int64[Tensor, "*b length"]
    clip: Int64[Tensor, "*b 77"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What training and validation have in common.

    Attributes:
        picture, text: for the encoders, or encoded already.
        noise: that the latents are mixed with, in their shape.
        position: of the run; for validation, the index in the held-out set.
        replaced: items that could not be read.
    """

    picture: Pixels | Latents
    text: Tokens | TextConditioning
    noise: Float32[Tensor, "*b ch h w"]
    position: Int64[Tensor, "*b"]
    replaced: list[Replacement] = field(default_factory=list)

    def pin_memory(self: T) -> T:
        """Copies in pinned memory; torch's DataLoader calls this."""
        return _map(lambda tensors: tensors[0].pin_memory(), [self])


@dataclass(frozen=True, kw_only=True)
class TrainingBatch(Batch):
    """`t`: time of each sample; 0 is data, 1 is noise."""

    t: Float32[Tensor, "*b"]


@dataclass(frozen=True, kw_only=True)
class ValidationBatch(Batch):
    """`weight`: 0 for items that cannot be read and for repeats that fill up a batch, else 1."""

    weight: Float32[Tensor, "*b"]


def stack(samples: Sequence[T]) -> T:
    """The batch of some samples."""
    return _map(default_collate, list(samples))  # which stacks in shared memory, in a worker


def _map(function: Callable[[list[Tensor]], Tensor], parts: list[Any]) -> Any:
    """A function of the tensors that stand at the same place in all parts; lists are joined."""
    first = parts[0]
    if isinstance(first, Tensor):
        return function(parts)
    if first is None:
        return None
    if isinstance(first, list):
        return list(chain(*parts))
    names = [field.name for field in fields(first)]
    values = {name: _map(function, [getattr(part, name) for part in parts]) for name in names}
    return type(first)(**values)
