"""From the bytes of an image file to a lazily decoded PIL image, or a named refusal."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from torchtitan_flux.data.formats import formats, unread_format
from torchtitan_flux.data.sources.listing import HEAD, foreign_content
from torchtitan_flux.data.sources.source import UnreadableItem

_REASON_LENGTH = 200

_ORIENTATION = 0x0112  # of EXIF

# An address in memory differs between ranks; their lists of unreadable items must not.
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>|0x[0-9a-fA-F]{6,}")


def open_image(data: bytes, item_id: str, max_pixels: int) -> Image.Image:
    """The picture that an image file holds; only its header is read here.

    Pixels are decoded by whoever uses them, within `damage_is_unreadable`. Of an animation, PIL
    shows the first frame.

    Raises:
        UnreadableItem: no image, or one of more than `max_pixels` pixels.
    """
    with damage_is_unreadable(item_id):
        image = _opened(io.BytesIO(data), item_id)
    if image.width * image.height > max_pixels:
        raise UnreadableItem(
            item_id,
            f"decompression bomb: {image.width} x {image.height} pixels, more than "
            f"data.max_image_pixels = {max_pixels}",
        )
    return image


def header_size(file: Any) -> tuple[int, int, str]:
    """(width, height) in pixels of an image as it is meant to be seen, and what is wrong with it.

    Only the header of the file, open for reading bytes, is looked at. Pictures that their EXIF
    data turn by a quarter have width and height exchanged. Where no image is found, these are 0
    and the third is `open_image`'s reason; else that is "".

    Raises:
        OSError: the operating system refuses to read the file.
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
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata of a picture that is otherwise fine
        return 1


def _opened(file: Any, item_id: str) -> Image.Image:
    try:
        return Image.open(file, formats=formats())
    except Image.UnidentifiedImageError as error:
        file.seek(0)
        raise UnreadableItem(item_id, _instead(file.read(HEAD))) from error


def _instead(head: bytes) -> str:
    """What a file is that is no image, by its first bytes."""
    if not head:
        return "the file is empty"
    known = ", ".join(formats()[:9])
    return (
        foreign_content(head, "FILE")
        or unread_format(head)
        or f"no image in a known format ({known} and {len(formats()) - 9} others)"
    )


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
    except Exception as error:
        raise UnreadableItem(item_id, f"{type(error).__name__}: {_text(error)}") from error


def _text(error: BaseException) -> str:
    """What an exception says, on one line, short, and without addresses."""
    return _ADDRESS.sub("...", " ".join(str(error).split()))[:_REASON_LENGTH]
