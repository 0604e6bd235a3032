"""From a PIL image of any mode and size to the array that the codec reads."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, UInt8
from PIL import Image

from torchtitan_flux.data.colours import WHITE, check_deep_colours, is_deep, to_mode
from torchtitan_flux.data.decode import exif_orientation
from torchtitan_flux.latents import ImageSize

CENTER = (0.5, 0.5)
"""The `crop_draw` of the middle."""

_MODES = {1: "L", 3: "RGB"}

_DRAFT_MARGIN = 1.5
# How many times the target's size a JPEG is decoded at, at least, where its decoder can shrink it
# by 2, 4 or 8 on the way. Against the full decode, where the margin is just met: 1 x 35 dB,
# 1.25 x 39.5 dB, 1.5 x 42.4 dB, 2 x 46.5 dB in the median (docs/benchmarks.md); JPEG's own loss
# at quality 90 is larger than that.

_WHOLE_PIXELS = 128
# Crops of so many pixels a side, when they shrink, begin and end between two pixels: half a pixel
# more or less does not show, and torch's resize knows no other.


# By EXIF orientation: how to turn a picture upright; whether columns and rows of the result run
# against those (or the rows and columns) of the stored picture. From 5 on, its sides are swapped.
_ORIENTATIONS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, True, False),
    3: (Image.Transpose.ROTATE_180, True, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, True),
    5: (Image.Transpose.TRANSPOSE, False, False),
    6: (Image.Transpose.ROTATE_270, True, False),
    7: (Image.Transpose.TRANSVERSE, True, True),
    8: (Image.Transpose.ROTATE_90, False, True),
}


@dataclass(frozen=True)
class PictureRules:
    """What holds for all pictures of a run.

    Attributes:
        background: red, green and blue, 0 to 255, behind transparent parts.
        min_size: pixels that the shorter side of a picture must have.
        srgb: embedded ICC profiles are applied.
    """

    background: tuple[int, int, int] = WHITE
    min_size: int = 1
    srgb: bool = False


class Picture(NamedTuple):
    """An upright, decoded image, and where in it the picture lies.

    A JPEG of 101 columns that is decoded at half its size has 51, of which the picture fills 50.5.

    Attributes:
        image: upright, decoded.
        left, top: first column and row, below 1; 0 except where EXIF turned what was left over.
        width, height: extent in pixels of `image`.
    """

    image: Image.Image
    left: float
    top: float
    width: float
    height: float


def load_picture(image: Image.Image, size: ImageSize) -> Picture:
    """Decode an image, no finer than `size` needs, and turn it as its EXIF orientation says.

    Raises:
        Exception: almost any, when the file behind the image is damaged.
    """
    # A picture made in memory has no metadata to look through; that look takes 10 us.
    if type(image) is Image.Image and not image.info:
        return Picture(image, 0, 0, *image.size)
    deep, extent, is_jpeg = is_deep(image), None, image.format in ("JPEG", "MPO")
    if not is_jpeg:  # whose EXIF stands before the pixels
        image.load()
    orientation = exif_orientation(image)
    turn = _ORIENTATIONS.get(orientation)
    swaps = turn is not None and orientation >= 5
    if is_jpeg:
        wanted = (size.height, size.width) if swaps else (size.width, size.height)
        least = (math.ceil(_DRAFT_MARGIN * wanted[0]), math.ceil(_DRAFT_MARGIN * wanted[1]))
        if drafted := image.draft(None, least):
            extent = drafted[1][2:]
        image.load()
    extent = extent or image.size
    if deep:
        check_deep_colours(image)
    if turn is None:
        return Picture(image, 0, 0, *extent)
    left, top = image.width - extent[0], image.height - extent[1]
    if swaps:
        left, top, extent = top, left, extent[::-1]
    method, flips_x, flips_y = turn
    return Picture(image.transpose(method), left * flips_x, top * flips_y, *extent)


def fit(
    picture: Picture,
    size: ImageSize,
    channels: int,
    crop_draw: tuple[float, float] = CENTER,
    flip: bool = False,
    background: tuple[int, int, int] = WHITE,
) -> Float32[np.ndarray, "channels height width"]:
    """Resize a picture so that it just covers `size`, crop, and scale to [-1, 1].

    Args:
        picture: of any PIL mode.
        size: pixels of the result.
        channels: 1 for gray, 3 for RGB.
        crop_draw: (x, y) in [0, 1): where in the part that is left over the crop lies.
        flip: mirror left and right.
        background: red, green and blue behind what is transparent.

    Raises:
        ValueError: other channels, or an image of a mode that PIL cannot convert.
    """
    if channels not in _MODES:
        raise ValueError(f"images have 1 or 3 channels, not {channels}")
    image = to_mode(picture.image, _MODES[channels], background)
    pixels = _resized_crop(picture._replace(image=image), size, crop_draw)
    if flip:
        pixels = pixels[:, ::-1]
    pixels = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    scaled = pixels.astype(np.float32, order="C")
    scaled /= 127.5
    scaled -= 1.0
    return scaled


def _resized_crop(
    picture: Picture, size: ImageSize, crop_draw: tuple[float, float]
) -> UInt8[np.ndarray, "height width *channels"]:
    """The crop of `size` from a picture as resized to cover it; sampled once, where needed."""
    image, x0, y0, full_width, full_height = picture
    if (full_width, full_height) == (size.width, size.height):
        return np.asarray(image)
    scale = max(size.width / full_width, size.height / full_height)
    if scale == 1.0:  # fits along one side: whole pixels, no blur
        left = int(crop_draw[0] * (full_width - size.width + 1))
        top = int(crop_draw[1] * (full_height - size.height + 1))
        return np.asarray(image.crop((left, top, left + size.width, top + size.height)))
    # The crop in pixels of the original; min() because of rounding in the last place.
    width = min(size.width / scale, full_width)
    height = min(size.height / scale, full_height)
    left = x0 + crop_draw[0] * (full_width - width)
    top = y0 + crop_draw[1] * (full_height - height)
    if scale < 1 and min(width, height) >= _WHOLE_PIXELS:
        return _shrunk(image, round(left), round(top), round(width), round(height), size)
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    # PIL widens the filter when it shrinks: antialiased
    return np.asarray(image.resize((size.width, size.height), Image.Resampling.BICUBIC, box=box))


def _shrunk(
    image: Image.Image, left: int, top: int, width: int, height: int, size: ImageSize
) -> UInt8[np.ndarray, "height width *channels"]:
    """A part of whole pixels by torch's copy of PIL's filter, which takes a third of the time.

    The two differ by 3 levels at most, 0.01 in the mean.
    """
    left, top = min(left, image.width - width), min(top, image.height - height)
    part = np.array(image.crop((left, top, left + width, top + height)))
    planes = torch.from_numpy(part).view(height, width, -1).permute(2, 0, 1)[None]
    planes = F.interpolate(
        planes, (size.height, size.width), mode="bicubic", antialias=True, align_corners=False
    )
    pixels = planes[0].permute(1, 2, 0).numpy()
    return pixels if part.ndim == 3 else pixels[:, :, 0]
