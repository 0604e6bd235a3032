"""From the bytes of an image file to a lazily decoded PIL image, or a named refusal."""

import functools
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from torchtitan_flux.data.sources import UnreadableItem

# No format that starts a program (EPS: Ghostscript) or follows names of other files is opened.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000", "BMP", "PPM")

_REASON_LENGTH = 200

# An address in memory differs between ranks; their lists of unreadable items must not.
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>|0x[0-9a-fA-F]{6,}")


def open_image(data: bytes, item_id: str, max_pixels: int) -> Image.Image:
    """The picture that an image file holds; only its header is read here.

    Pixels are decoded by whoever uses them, within `damage_is_unreadable`. Of an animation, PIL
    shows the first frame.

    Raises:
        UnreadableItem: no image, or one of more than `max_pixels` pixels.
    """
    if not data:
        raise UnreadableItem(item_id, "the file is empty")
    with damage_is_unreadable(item_id):
        image = Image.open(io.BytesIO(data), formats=_formats())
    if image.width * image.height > max_pixels:
        raise UnreadableItem(
            item_id,
            f"decompression bomb: {image.width} x {image.height} pixels, more than "
            f"data.max_image_pixels = {max_pixels}",
        )
    return image


@contextmanager
def damage_is_unreadable(item_id: str) -> Iterator[None]:
    """Files are decoded lazily: whatever PIL raises meanwhile means that the item is damaged.

    Damaged files make PIL raise almost anything (IndexError, struct.error, TypeError, MemoryError
    for a header that lies, ...), so no list of exceptions would be complete. The reason is the
    same on every rank.
    """
    try:
        yield
    except UnreadableItem:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableItem(item_id, f"decompression bomb: {_text(error)}") from error
    except Image.UnidentifiedImageError as error:
        raise UnreadableItem(item_id, f"no image in a known format ({_known()})") from error
    except Exception as error:
        raise UnreadableItem(item_id, f"{type(error).__name__}: {_text(error)}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that this build of PIL can read."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _known() -> str:
    return ", ".join(_formats())


def _text(error: BaseException) -> str:
    """What an exception says, on one line, short, and without addresses."""
    return _ADDRESS.sub("...", " ".join(str(error).split()))[:_REASON_LENGTH]
