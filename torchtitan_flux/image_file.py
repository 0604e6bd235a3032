"""Picture files that say how they were drawn: PNG, JPEG, WebP; each is whole or not there."""

import json
from collections.abc import Mapping
from pathlib import Path

from PIL import ExifTags, Image, PngImagePlugin

from torchtitan_flux.files import replacing

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""By suffix."""
SAVE_OPTIONS = {"PNG": {}, "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
"""JPEG is for small files; the other two hold the pixels as they were drawn."""
LONGEST = {"PNG": 2**31 - 1, "JPEG": 65_500, "WEBP": 16_383}
"""Pixels of a side that a format can hold."""
ROOM = 65_000
"""Bytes of facts that a JPEG or WebP can hold: EXIF ends at 64 KiB."""

_CODE = b"ASCII\0\0\0"
"""EXIF's prefix of a comment in ASCII."""


def save_picture(image: Image.Image, path: Path, facts: Mapping[str, object]) -> None:
    """Write a picture in the format of its suffix, with what it was drawn with.

    PNG has a text entry for each fact, JPEG and WebP have all as JSON in EXIF's UserComment. Leaves
    nothing where it raises OSError, or ValueError for more facts than the format has room for.
    """
    kind = FORMATS[path.suffix.lower()]
    if kind == "PNG":
        metadata = PngImagePlugin.PngInfo()
        for name, value in facts.items():
            metadata.add_text(name, str(value))
        more: dict[str, object] = {"pnginfo": metadata}
    else:
        exif = Image.Exif()
        exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: exif_comment(facts)}
        more = {"exif": exif}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        image.save(unfinished, format=kind, **SAVE_OPTIONS[kind], **more)


def read_facts(path: Path) -> tuple[str, dict[str, str]]:
    """(format, facts) of a picture; OSError or ValueError where it cannot be read."""
    try:
        with Image.open(path) as image:
            kind = str(image.format)
            if kind == "PNG":
                return kind, dict(getattr(image, "text", {}))
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
            return kind, _parse_comment(comment)
    except OSError:
        raise
    except Exception as error:  # strangers' files break Pillow's readers in many ways
        raise ValueError(f"{type(error).__name__}: {error}") from None


def exif_comment(facts: Mapping[str, object]) -> bytes:
    """Facts as EXIF's UserComment; ValueError where it has no room for them."""
    comment = _CODE + json.dumps({name: str(value) for name, value in facts.items()}).encode()
    if len(comment) > ROOM:
        raise ValueError(f"its prompt and settings take {len(comment)} bytes, EXIF holds {ROOM}")
    return comment


def _parse_comment(comment: object) -> dict[str, str]:
    if not isinstance(comment, bytes) or not comment.startswith(_CODE):
        return {}
    try:
        facts = json.loads(comment.removeprefix(_CODE))
    except (ValueError, RecursionError):  # somebody else's comment
        facts = None
    if not isinstance(facts, dict):
        return {}
    return {name: value for name, value in facts.items() if isinstance(value, str)}
