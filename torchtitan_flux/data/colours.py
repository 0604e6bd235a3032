"""From any PIL mode to gray or RGB of 8 bits: transparency, deep gray, floats, Lab."""

import functools

import numpy as np
from PIL import Image, ImageCms

WHITE = (255, 255, 255)

_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")


def to_mode(image: Image.Image, mode: str, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """An image of any mode as "L" or "RGB".

    Gray of 16 bits keeps its upper 8. Floats are 0 to 1 or, if any is above 1, 0 to 255.

    Args:
        image: decoded.
        mode: "L" or "RGB".
        background: red, green and blue behind what is transparent.

    Raises:
        ValueError: floats that are not finite or outside 0 to 255, or a mode unknown to PIL.
    """
    clear = image.info.get("transparency")
    if clear is None and image.mode == mode:
        return image
    if image.mode in _ALPHA_MODES:
        return _composed(image, mode, background)
    if image.mode.startswith("I"):
        gray = _from_16_bits(image)
        if isinstance(clear, int):
            mask = np.asarray(image) != clear
            gray.putalpha(Image.fromarray(mask))
            return _composed(gray, mode, background)
        return gray.convert(mode)
    if image.mode == "F":
        return _from_floats(image).convert(mode)
    if clear is not None and image.mode in ("1", "L", "P", "RGB"):
        return _composed(image, mode, background)
    if image.mode == "LAB":
        image = ImageCms.applyTransform(image, _lab_to_srgb()) or image
    return image.convert(mode)


def _composed(image: Image.Image, mode: str, background: tuple[int, int, int]) -> Image.Image:
    """What is seen where the image lies on the background."""
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    behind = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(behind, image).convert(mode)


def _from_16_bits(image: Image.Image) -> Image.Image:
    # PIL clips these to 8 bits instead of scaling; "I" is how it opens some 16-bit PNGs.
    values = np.clip(np.asarray(image), 0, 65535) / 257.0
    return Image.fromarray(np.round(values).astype(np.uint8))


def _from_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):  # a NaN compares false
        raise ValueError(f"float pixels from {low:g} to {high:g}, not in 0 to 1 or 0 to 255")
    if high <= 1:
        values = values * 255.0
    return Image.fromarray(np.round(values).astype(np.uint8))


@functools.cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
