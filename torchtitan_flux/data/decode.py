"""From the bytes of an image file to a lazily decoded PIL image, or a named refusal."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from PIL import ExifTags, Image

from torchtitan_flux.data.formats import formats, unread_format
from torchtitan_flux.data.sources.listing import HEAD, foreign_content
from torchtitan_flux.data.sources.source import MAX_PIXELS, UnreadableItem

_REASON_LENGTH = 200

# An address in memory differs between ranks; their lists of unreadable items must not.
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>|0x[0-9a-fA-F]{6,}")


def open_image(data: bytes, item_id: str, max_pixels: int) -> Image.Image:
    """The picture in an image file, whose pixels are decoded when they are used, within
    `damage_is_unreadable`; UnreadableItem for no image, or more than `max_pixels` pixels."""
    with damage_is_unreadable(item_id):
        image = _opened(io.BytesIO(data), item_id)
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height} pixels"
        what = f"decompression bomb: {size}, more than {MAX_PIXELS} = {max_pixels}"
        raise UnreadableItem(item_id, what)
    return image


def header_size(file: IO[bytes] | io.BufferedIOBase) -> tuple[int, int, str]:
    """(width, height) in pixels of the upright picture by its header, and what is wrong with it.

    They are 0 where no image is found. OSError where the system refuses to read the file.
    """
    try:
        with damage_is_unreadable(""), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whoever decodes the picture judges it
            image = _opened(file, "")
            width, height = image.size
            # Without the test, PNG files would be decoded in search of EXIF data at their end.
            if "exif" in image.info and exif_orientation(image) >= 5:
                width, height = height, width
    except UnreadableItem as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno is not None:
            raise cause from None
        return 0, 0, error.reason
    return width, height, ""


def exif_orientation(image: Image.Image) -> int:
    """How a picture lies, 1 to 8 as EXIF counts; 5 to 8 lie on their side."""
    if image.format == "JXL":  # its decoder turns pictures itself, whatever their EXIF data say
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata of a picture that is otherwise fine
        return 1


def _opened(file: IO[bytes] | io.BufferedIOBase, item_id: str) -> Image.Image:
    try:
        return Image.open(file, formats=formats())  # pyright: ignore[reportArgumentType]
    except Image.UnidentifiedImageError as error:
        file.seek(0)
        head = file.read(HEAD)
        reason = foreign_content(head) or unread_format(head) or "no image in a known format"
        raise UnreadableItem(item_id, reason if head else "the file is empty") from error


@contextmanager
def damage_is_unreadable(item_id: str) -> Iterator[None]:
    """Whatever PIL raises meanwhile means that the item is damaged: it may be almost anything.

    The reason is the same on every rank: one line, short, and without addresses.
    """
    try:
        yield
    except UnreadableItem:
        raise
    except Exception as error:
        text = _ADDRESS.sub("...", " ".join(str(error).split()))[:_REASON_LENGTH]
        raise UnreadableItem(item_id, f"{type(error).__name__}: {text}") from error
