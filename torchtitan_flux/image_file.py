"""Picture files that say how they were drawn: PNG, JPEG, WebP; each is whole or not there."""

import json
from collections.abc import Mapping
from pathlib import Path

from PIL import ExifTags, Image, PngImagePlugin

from torchtitan_flux.files import replacing

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""By suffix."""
_SAVE_OPTIONS = {"PNG": {}, "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
_CODE = b"ASCII\0\0\0"  # EXIF's prefix of a comment in ASCII


def save_picture(image: Image.Image, path: Path, facts: Mapping[str, object]) -> None:
    """Write a picture in the format of its suffix, with what it was drawn with.

    PNG has a text entry for each fact, JPEG and WebP have all as JSON in EXIF's UserComment. Leaves
    nothing where it raises OSError, or ValueError for more than the format can hold.
    """
    kind, texts = FORMATS[path.suffix.lower()], {name: str(facts[name]) for name in facts}
    metadata, exif = PngImagePlugin.PngInfo(), Image.Exif()
    for name, value in texts.items():
        metadata.add_text(name, value)
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: _CODE + json.dumps(texts).encode()}
    more = {"pnginfo": metadata} if kind == "PNG" else {"exif": exif}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        image.save(unfinished, format=kind, **_SAVE_OPTIONS[kind], **more)


def read_facts(path: Path) -> tuple[str, dict[str, str]]:
    """(format, facts) of a picture; OSError or ValueError where it cannot be read."""
    try:
        with Image.open(path) as image:
            kind = str(image.format)
            if kind == "PNG":
                return kind, dict(getattr(image, "text", {}))
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except OSError:
        raise
    except Exception as error:  # strangers' files break Pillow's readers in many ways
        raise ValueError(f"{type(error).__name__}: {error}") from None
    try:
        facts = json.loads(comment.removeprefix(_CODE))
        return kind, {name: str(value) for name, value in facts.items()}
    except (AttributeError, TypeError, ValueError, RecursionError):  # somebody else's comment
        return kind, {}
