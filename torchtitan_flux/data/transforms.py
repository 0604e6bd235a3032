"""From a PIL image of any mode and size to the array that the codec reads."""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, UInt8
from PIL import Image, ImageCms

from torchtitan_flux.data.decode import exif_orientation
from torchtitan_flux.latents import ImageSize

CENTER = (0.5, 0.5)
"""The `crop_draw` of the middle."""
WHITE = (255, 255, 255)

_MODES = {1: "L", 3: "RGB"}

_DRAFT_MARGIN = 1.5
# How many times the target's size a JPEG is decoded at, at least, where its decoder can shrink it
# by 2, 4 or 8 on the way. Against the full decode, where the margin is just met: 1 x 35 dB,
# 1.25 x 39.5 dB, 1.5 x 42.4 dB, 2 x 46.5 dB in the median (docs/benchmarks.md); JPEG's own loss
# at quality 90 is larger than that.

_WHOLE_PIXELS = 128
# Crops of so many pixels a side, when they shrink, begin and end between two pixels: half a pixel
# more or less does not show, and torch's resize knows no other.

_NEARLY_BLACK = 16  # of 255: what stays below when 12 bits are taken for 16

_UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_training_image(
    image: Image.Image,
    size: ImageSize,
    channels: int,
    crop_draw: tuple[float, float] = CENTER,
    flip: bool = False,
    background: tuple[int, int, int] = WHITE,
    srgb: bool = False,
) -> Float32[np.ndarray, "channels height width"]:
    """Turn a picture upright, resize it so that it just covers `size`, crop, scale to [-1, 1].

    Args:
        image: of any PIL mode, decoded or not yet.
        size: pixels of the result.
        channels: 1 for gray, 3 for RGB.
        crop_draw: (x, y) in [0, 1): where in the part that is left over the crop lies.
        flip: mirror left and right.
        background: red, green and blue, 0 to 255, behind what is transparent.
        srgb: apply an embedded ICC profile.

    Raises:
        Exception: almost any, when the file behind the image is damaged.
    """
    image, extent = load_picture(image, size)
    image = _to_mode(_in_srgb(image) if srgb else image, _MODES[channels], background)
    pixels = _resized_crop(image, extent, size, crop_draw)
    if flip:
        pixels = pixels[:, ::-1]
    pixels = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    scaled = pixels.astype(np.float32, order="C")
    scaled /= 127.5
    scaled -= 1.0
    return scaled


def load_picture(image: Image.Image, size: ImageSize) -> tuple[Image.Image, tuple[float, float]]:
    """(the upright image, width and height of the picture in its pixels).

    A JPEG that lies upright is decoded no finer than `size` needs. One of 101 columns that is
    decoded at half its size has 51, of which the picture fills 50.5.
    """
    drafted = None
    if image.format in ("JPEG", "MPO") and exif_orientation(image) == 1:
        least = math.ceil(_DRAFT_MARGIN * size.width), math.ceil(_DRAFT_MARGIN * size.height)
        drafted = image.draft(None, least)
    image.load()
    if (orientation := exif_orientation(image)) in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    width, height = drafted[1][2:] if drafted else image.size
    return image, (float(width), float(height))


def _in_srgb(image: Image.Image) -> Image.Image:
    """The image with its ICC profile applied, unless that is damaged or of other colours."""
    if profile := image.info.get("icc_profile"):
        mode = "RGBA" if image.has_transparency_data else "RGB"
        image = image.convert(mode) if mode == "RGBA" or image.mode == "P" else image
        srgb = ImageCms.createProfile("sRGB")
        try:
            found = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode=mode)
            return found or image
        except ImageCms.PyCMSError:
            pass
    return image


def _to_mode(image: Image.Image, mode: str, background: tuple[int, int, int]) -> Image.Image:
    """An image of any mode as "L" or "RGB", on `background` where it is transparent."""
    transparent = image.has_transparency_data
    if image.mode == "F" or image.mode.startswith("I"):
        if transparent:
            raise ValueError("gray pixels of 16 bits, and one value of them is transparent")
        image = _to_8_bits(image)
    if transparent:
        behind = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(behind, image.convert("RGBA"))
    return image if image.mode == mode else image.convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Gray integers of 16 bits, or floats: 0 to 1 or, if any is above 1, 0 to 255.

    ValueError for others, and for what would come out nearly black: it has fewer bits than its
    file says.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    limit = 255 if image.mode == "F" else 65535
    white = 1 if image.mode == "F" and high <= 1 else limit
    if not (low >= 0 and high <= limit):  # a NaN compares false
        raise ValueError(f"gray pixels from {low:g} to {high:g}, not in 0 to {limit}")
    if 0 < high * 255 / white < _NEARLY_BLACK:
        raise ValueError(f"gray pixels up to {high:g}, nearly black where {white} is white")
    return Image.fromarray(np.round(values * (255.0 / white)).astype(np.uint8))


def _resized_crop(
    image: Image.Image,
    extent: tuple[float, float],
    size: ImageSize,
    crop_draw: tuple[float, float],
) -> UInt8[np.ndarray, "height width *channels"]:
    """The crop of `size` from a picture as resized to cover it; sampled once, where needed."""
    full_width, full_height = extent
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
    left = crop_draw[0] * (full_width - width)
    top = crop_draw[1] * (full_height - height)
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
