"""Where items come from: the `Source` protocol and the sources that a configuration can name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from PIL import Image

from torchtitan_flux.latents import ImageSize

Split = Literal["train", "held_out"]

NAMING_KEY: dict[Split, str] = {"train": "training.dataset", "held_out": "validation.dataset"}
"""The TOML key that names the source of each split."""


@dataclass(frozen=True)
class Item:
    """One picture with what can be said about it.

    Attributes:
        image: any mode and size; shared between calls, not to be written to.
        captions: at least one; the first is the canonical one, which validation uses.
        item_id: stable name of the item, unique over all splits of its data set.
    """

    image: Image.Image
    captions: tuple[str, ...]
    item_id: str


class UnreadableItem(Exception):
    """An item exists but cannot be read; the loader goes on with another one."""

    def __init__(self, item_id: str, reason: str):
        super().__init__(item_id, reason)  # both, so that the exception can be pickled
        self.item_id = item_id
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.item_id}: {self.reason}"


@runtime_checkable
class Source(Protocol):
    """A fixed, indexed collection of items; index i is the same item in every run."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item:
        """The item at 0 <= index < len; raises UnreadableItem when its data are damaged."""
        ...


def _digits(split: Split, path: str | None, image_size: ImageSize | None) -> Source:
    from torchtitan_flux.data.digits import DigitsSource

    return DigitsSource(split)


def _shapes(split: Split, path: str | None, image_size: ImageSize | None) -> Source:
    from torchtitan_flux.data.shapes import ShapesSource

    return ShapesSource(split, image_size or ImageSize(64, 64))


# Builders import when called: sklearn takes a second to load, and a run reads one or two sources.
SOURCES: dict[str, Callable[[Split, str | None, ImageSize | None], Source]] = {
    "digits": _digits,
    "shapes": _shapes,
}

# Names that torchtitan's FLUX files use, known here so that the message can be precise.
NOT_YET = ("cc12m-wds", "cc12m-test", "coco-validation")


def build_source(
    name: str, split: Split, path: str | None = None, image_size: ImageSize | None = None
) -> Source:
    """Build the source that the configuration names.

    Args:
        name: a key of `SOURCES`.
        split: "train" or "held_out"; the two never share an item.
        path: where a source that reads files finds them; built-in sources have no use for it.
        image_size: size in pixels at which a procedural source draws (64 x 64 when None). Sources
            of stored pictures ignore it; the transform resizes those.

    Raises:
        ValueError: unknown name, or a data set that this version cannot read.
    """
    known = ", ".join(sorted(SOURCES))
    if name in NOT_YET:
        raise ValueError(
            f"{NAMING_KEY[split]}: data set {name!r} is not available yet; known: {known}"
        )
    if name not in SOURCES:
        raise ValueError(f"{NAMING_KEY[split]}: unknown data set {name!r}; known: {known}")
    return SOURCES[name](split, path, image_size)
