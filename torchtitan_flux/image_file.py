"""Picture files that say how they were drawn: PNG, JPEG, WebP; each is whole or not there."""

import json
from collections.abc import Mapping
from pathlib import Path

from PIL import ExifTags, Image, PngImagePlugin

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""By suffix."""
OPTIONS = {"PNG": {}, "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
"""JPEG is for small files; the other two hold the pixels as they were drawn."""
LONGEST = {"PNG": 2**31 - 1, "JPEG": 65_500, "WEBP": 16_383}
"""Pixels of a side that a format can hold."""
ROOM = 65_000
"""Bytes of facts that a JPEG or WebP can hold: EXIF ends at 64 KiB."""

_CODE = b"ASCII\0\0\0"
"""What EXIF wants in front of a comment of ASCII letters."""


def save_picture(image: Image.Image, path: Path, facts: Mapping[str, object]) -> None:
    """Write a picture in the format of its suffix, with what it was drawn with.

    PNG has a text entry for each fact, JPEG and WebP have all as JSON in EXIF's UserComment.
    Written beside and renamed, so that a reader never sees half a picture.

    Args:
        image: gray or RGB.
        path: its folder is made where there is none.
        facts: prompt, steps, seed, …

    Raises:
        OSError: it cannot be written; nothing is left of it.
        ValueError: there are more facts than the format has room for; nothing is written.
    """
    kind = FORMATS[path.suffix.lower()]
    more = {"pnginfo": _text(facts)} if kind == "PNG" else {"exif": _exif(facts)}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    try:
        image.save(scratch, format=kind, **OPTIONS[kind], **more)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)  # where one of them failed


def read_facts(path: Path) -> tuple[str, dict[str, str]]:
    """(format, facts) of a picture; no facts where it holds none.

    Raises:
        OSError, ValueError: it is no picture that can be read.
    """
    try:
        with Image.open(path) as image:
            kind = str(image.format)
            if kind == "PNG":
                return kind, dict(getattr(image, "text", {}))
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
            return kind, _of_comment(comment)
    except OSError:
        raise
    except Exception as error:  # strangers' files break Pillow's readers in many ways
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _text(facts: Mapping[str, object]) -> PngImagePlugin.PngInfo:
    metadata = PngImagePlugin.PngInfo()
    for name, value in facts.items():
        metadata.add_text(name, str(value))
    return metadata


def as_comment(facts: Mapping[str, object]) -> bytes:
    """Facts as EXIF's UserComment.

    Raises:
        ValueError: EXIF has no room for them.
    """
    comment = _CODE + json.dumps({name: str(value) for name, value in facts.items()}).encode()
    if len(comment) > ROOM:
        raise ValueError(f"its prompt and settings take {len(comment)} bytes, EXIF holds {ROOM}")
    return comment


def _exif(facts: Mapping[str, object]) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: as_comment(facts)}
    return exif


def _of_comment(comment: object) -> dict[str, str]:
    if not isinstance(comment, bytes) or not comment.startswith(_CODE):
        return {}
    try:
        facts = json.loads(comment.removeprefix(_CODE))
    except (ValueError, RecursionError):
        return {}  # somebody else's comment
    if not isinstance(facts, dict):
        return {}
    return {name: value for name, value in facts.items() if isinstance(value, str)}
