"""From a PIL image of any mode and size to the array that the codec reads."""

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageOps

from torchtitan_flux.latents import ImageSize

CENTER = (0.5, 0.5)
"""The crop draw that takes the middle of an image."""

_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
_MODES = {1: "L", 3: "RGB"}


def upright(image: Image.Image) -> Image.Image:
    """Turn the image as its EXIF orientation says. Forces a lazily opened file to be decoded."""
    # A picture made in memory has no metadata to look through; that look takes 10 us.
    if type(image) is Image.Image and not image.info:
        return image
    image.load()
    return ImageOps.exif_transpose(image)


def needs_crop(image: Image.Image, size: ImageSize) -> bool:
    """Whether an upright image has another aspect ratio than `size`."""
    return image.width * size.height != image.height * size.width


def to_training_image(
    image: Image.Image,
    size: ImageSize,
    channels: int,
    crop_draw: tuple[float, float] = CENTER,
    flip: bool = False,
) -> Float32[np.ndarray, "channels height width"]:
    """Resize so that the image just covers `size`, crop, and scale to [-1, 1].

    Args:
        image: any PIL mode; what is transparent becomes white.
        size: pixels of the result.
        channels: 1 for gray, 3 for RGB.
        crop_draw: (x, y) in [0, 1): where in the part that is left over the crop lies.
        flip: mirror left and right.

    Raises:
        ValueError: a number of channels other than 1 and 3, or an image of a mode that PIL cannot
            convert.
        OSError: the file behind the image is damaged.
    """
    if channels not in _MODES:
        raise ValueError(f"images have 1 or 3 channels, not {channels}")
    image = _convert(upright(image), _MODES[channels])
    image = _cover(image, size, crop_draw)
    pixels = np.asarray(image)
    if flip:
        pixels = pixels[:, ::-1]
    pixels = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    scaled = pixels.astype(np.float32, order="C")
    scaled /= 127.5
    scaled -= 1.0
    return scaled


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """To "L" or "RGB": transparent parts white, 16-bit gray by its upper 8 bits."""
    if image.mode == mode and not image.info:
        return image
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert(mode)
    if image.mode.startswith("I"):
        # PIL clips these to 8 bits instead of scaling; "I" is how it opens some 16-bit PNGs.
        values = np.clip(np.asarray(image), 0, 65535) / 257.0
        image = Image.fromarray(np.round(values).astype(np.uint8))
    return image.convert(mode)


def _cover(image: Image.Image, size: ImageSize, crop_draw: tuple[float, float]) -> Image.Image:
    """The crop of `size` from the image as resized to cover it; sampled once, only where needed."""
    if image.size == (size.width, size.height):
        return image
    scale = max(size.width / image.width, size.height / image.height)
    if scale == 1.0:  # fits along one side: whole pixels, no blur
        left = int(crop_draw[0] * (image.width - size.width + 1))
        top = int(crop_draw[1] * (image.height - size.height + 1))
        return image.crop((left, top, left + size.width, top + size.height))
    # The crop in pixels of the original; min() because of rounding in the last place.
    width = min(size.width / scale, image.width)
    height = min(size.height / scale, image.height)
    left = crop_draw[0] * (image.width - width)
    top = crop_draw[1] * (image.height - height)
    return image.resize(
        (size.width, size.height),
        Image.Resampling.BICUBIC,  # PIL widens the filter when it shrinks: antialiased
        box=(left, top, min(left + width, image.width), min(top + height, image.height)),
    )
