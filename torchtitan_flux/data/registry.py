"""The sources that a configuration can name."""

from collections.abc import Callable

from torchtitan_flux.data.sources import Source, Split
from torchtitan_flux.latents import ImageSize

NAMING_KEY: dict[Split, str] = {"train": "training.dataset", "held_out": "validation.dataset"}
"""The TOML key that names the source of each split."""


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
