"""A procedural data set: one coloured shape, its size, its place and the background, in words.

It serves three channels, any resolution and any number of items without a download, and what a
caption says can be measured in the picture.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from torchtitan_flux.data.sources.source import Item, Split
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.randomness import Stream, generator

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 200, 20),
    "orange": (255, 127, 14),
    "purple": (128, 50, 170),
    "pink": (240, 120, 190),
    "brown": (120, 72, 50),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}
RADII = {"small": 0.08, "medium": 0.115, "large": 0.15}
"""Radius of the circle that encloses a shape, in units of the image's shorter side."""

_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")

_OVERSAMPLING = 4  # drawn so many times larger, then averaged: PIL draws hard edges
_BORDER = 0.02  # distance of every shape from the edge of the image, on either axis
_CELL_MARGIN = 0.04  # distance of a centre from the next third, so that the place is beyond doubt
_DATA_SEED = 0  # the data set is the same one in every run
_LENGTHS = {"train": 100_000, "held_out": 1_000}


def _regular(corners: int, start: float = -0.25) -> np.ndarray:
    """Corners [corners, 2] (x, y) of a regular polygon in the unit circle, from `start` turns."""
    angles = 2 * np.pi * (np.arange(corners) / corners + start)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> np.ndarray:
    points = _regular(10)
    points[1::2] *= 0.45
    return points


def _cross() -> np.ndarray:
    arm = 0.32
    quadrant = np.array([(arm, -1.0), (arm, -arm), (1.0, -arm)]) / np.hypot(arm, 1.0)
    turn = np.array([(0.0, 1.0), (-1.0, 0.0)])  # row vectors, a quarter turn
    return np.concatenate([quadrant @ np.linalg.matrix_power(turn, k) for k in range(4)])


# Corners in the unit circle, y downwards, centroid at the origin. The circle is drawn as one.
POLYGONS: dict[str, np.ndarray | None] = {
    "circle": None,
    "triangle": _regular(3),
    "square": _regular(4, start=0.125),
    "diamond": _regular(4) * (0.7, 1.0),
    "star": _star(),
    "cross": _cross(),
}


@dataclass(frozen=True)
class Scene:
    """What a picture shows; centre in units of (width, height), so for any image size."""

    color: str
    shape: str
    size: str
    background: str
    row: int
    column: int
    center: tuple[float, float]

    @property
    def place(self) -> str:
        """The third in each direction that holds the centre: "top left", "left", "center", ..."""
        return " ".join(filter(None, (_ROWS[self.row], _COLUMNS[self.column]))) or "center"

    @property
    def captions(self) -> tuple[str, ...]:
        """Several phrasings, all true; the canonical one says everything."""
        thing = f"{self.color} {self.shape}"
        where = "in the center" if self.place == "center" else f"at the {self.place}"
        article = "an" if self.color[0] in "aeiou" else "a"
        return (
            f"a {self.size} {thing} {where} on a {self.background} background",
            f"{self.background} background, {self.size} {thing} {where}",
            f"a {self.size} {thing} {where}",
            f"{article} {thing} on a {self.background} background",
            f"{where}, there is {article} {thing}",
        )


def draw_scene(scene: Scene, size: ImageSize) -> Image.Image:
    """An RGB picture of the scene with antialiased edges."""
    width, height = size.width * _OVERSAMPLING, size.height * _OVERSAMPLING
    image = Image.new("RGB", (width, height), BACKGROUNDS[scene.background])
    center = np.array(scene.center) * (width, height)
    radius = RADII[scene.size] * min(width, height)
    corners = POLYGONS[scene.shape]
    draw = ImageDraw.Draw(image)
    # PIL counts the pixel at a coordinate as covered, while `center` counts from pixel edges.
    if corners is None:
        box = np.concatenate([center - radius, center + radius]) - 0.5
        draw.ellipse(box.tolist(), fill=COLORS[scene.color])
    else:
        points = center - 0.5 + radius * corners
        draw.polygon(points.ravel().tolist(), fill=COLORS[scene.color])
    return image.reduce(_OVERSAMPLING)


class ShapesSource:
    """Items drawn on demand at a size in pixels; ids are "shapes/<split>/<index>".

    What item i shows is a function of (the data set, split, i): the same at every image size and
    in every run. There are 100,000 to train and 1,000 held out unless `length` says otherwise.
    """

    name = "shapes"

    def __init__(self, split: Split, image_size: ImageSize, length: int | None = None):
        self.split = split
        self.image_size = image_size
        self._length = _LENGTHS[split] if length is None else length

    def __len__(self) -> int:
        return self._length

    def scene(self, index: int) -> Scene:
        """What item `index` shows."""
        rng = generator(_DATA_SEED, Stream.SHAPES, f"{self.split}/{index}")
        pick = rng.random(8).tolist()

        color, shape, size, background = (
            list(names)[int(draw * len(names))]
            for names, draw in zip((COLORS, POLYGONS, RADII, BACKGROUNDS), pick[:4], strict=True)
        )
        row, column = int(pick[4] * 3), int(pick[5] * 3)
        center = _coordinate(column, size, pick[6]), _coordinate(row, size, pick[7])
        return Scene(color, shape, size, background, row, column, center)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self._length:
            raise IndexError(f"item {index} of a source of {self._length}")
        scene = self.scene(index)
        image = draw_scene(scene, self.image_size)
        return Item(image, scene.captions, f"shapes/{self.split}/{index:06d}")


def _coordinate(third: int, size: str, draw: float) -> float:
    """A centre in the given third of the image, from which the whole shape is inside the image."""
    reach = RADII[size] + _BORDER
    low = max(third / 3 + _CELL_MARGIN, reach)
    high = min((third + 1) / 3 - _CELL_MARGIN, 1 - reach)
    return low + draw * (high - low)
