"""From any PIL mode to gray or RGB of 8 bits: transparency, deep gray, floats, Lab."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

WHITE = (255, 255, 255)

_NEARLY_BLACK = 16  # of 255: what stays below when 12 bits are taken for 16
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # mode -> colour space of its profiles
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")


def to_mode(image: Image.Image, mode: str, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """An image of any mode as "L" or "RGB", on `background` where it is transparent.

    Gray of 16 bits keeps its upper 8; floats are 0 to 1 or, if any is above 1, 0 to 255. ValueError
    for others, and for what would come out nearly black: it has fewer bits than its file says.
    """
    clear = image.info.get("transparency")
    if clear is None and image.mode == mode:
        return image
    if image.mode.startswith("I"):
        gray = _to_8_bits(image)
        if not isinstance(clear, int):
            return gray.convert(mode)
        gray.putalpha(Image.fromarray(np.asarray(image) != clear))
        image = gray
    elif image.mode == "F":
        return _to_8_bits(image).convert(mode)
    if image.mode in _ALPHA_MODES or (clear is not None and image.mode in ("1", "L", "P", "RGB")):
        if image.mode == "La":
            image = image.convert("LA")
        behind = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(behind, image.convert("RGBA")).convert(mode)
    if image.mode == "LAB":
        image = ImageCms.applyTransform(image, _lab_to_srgb()) or image
    return image.convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Gray integers of 16 bits, or floats; PIL would clip them instead of scaling."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        white, limit, wanted = (1 if high <= 1 else 255), 255, "0 to 1 or 0 to 255"
    else:
        white, limit, wanted = 65535, 65535, "0 to 65535"
    pixels = f"{'float' if image.mode == 'F' else 'gray'} pixels from {low:g} to {high:g}"
    if not (low >= 0 and high <= limit):  # a NaN compares false
        raise ValueError(f"{pixels}, not in {wanted}")
    if 0 < high * 255 / white < _NEARLY_BLACK:
        times = f"multiply them by {int(white / high)} or so"
        raise ValueError(f"{pixels}, nearly black where {white} is white; {times}")
    return Image.fromarray(np.round(values * (255.0 / white)).astype(np.uint8))


def is_deep(image: Image.Image) -> bool:
    """Whether the file of an image that is not decoded yet has 16 bits for each colour."""
    stored = str(getattr(image, "tile", ""))
    return image.mode in ("RGB", "RGBA") and (";16" in stored or "65535" in stored)


def check_deep_colours(image: Image.Image) -> None:
    """Refuse colours of 16 bits, decoded to 8, that hold fewer bits, with a ValueError."""
    high = 257 * int(np.asarray(image)[..., :3].max())
    if 0 < high < 257 * _NEARLY_BLACK:
        raise ValueError(
            f"colours of 16 bits up to {high} or so, nearly black where 65535 is white; multiply "
            f"them by {65535 // (high + 257)} or so"
        )


def in_srgb(image: Image.Image) -> Image.Image:
    """The decoded image with its ICC profile applied, unless that is damaged or does not fit."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    alpha, colours = None, image
    try:
        if image.mode.startswith("I"):
            colours = _to_8_bits(image)
        elif image.mode != "CMYK":
            mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
            if image.mode in _ALPHA_MODES or "transparency" in image.info:
                colours = image.convert(f"{mode}A")
                alpha = colours.getchannel("A")
            colours = colours.convert(mode)
        found = ImageCms.applyTransform(colours, _to_srgb(profile, colours.mode)) or colours
    except Exception:  # of several sorts: PyCMSError, OSError, ValueError, KeyError
        return image
    if alpha:
        found.putalpha(alpha)
    return found


@functools.lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """Raises whatever LittleCMS has against the profile, or against it for this mode."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()  # pyright: ignore[reportAttributeAccessIssue]
    if space != _SPACES[mode]:
        raise ValueError(f"a profile of {space} colours")
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


@functools.cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
