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
_CODE = b"ASCII\0\0\0"
"""EXIF's prefix of a comment in ASCII."""


def save_picture(image: Image.Image, path: Path, facts: Mapping[str, object]) -> None:
    """Write a picture in the format of its suffix, with what it was drawn with.

    PNG has a text entry for each fact, JPEG and WebP have all as JSON in EXIF's UserComment. Leaves
    nothing where it raises OSError, or ValueError for more facts than EXIF's 64 KiB.
    """
    kind, texts = FORMATS[path.suffix.lower()], {key: str(value) for key, value in facts.items()}
    if kind == "PNG":
        metadata = PngImagePlugin.PngInfo()
        for name, value in texts.items():
            metadata.add_text(name, value)
        more: dict[str, object] = {"pnginfo": metadata}
    else:
        exif = Image.Exif()
        comment = _CODE + json.dumps(texts).encode()
        exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
        more = {"exif": exif}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        image.save(unfinished, format=kind, **SAVE_OPTIONS[kind], **more)


def read_facts(path: Path) -> dict[str, str]:
    """What `save_picture` wrote; OSError or ValueError where it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.format == "PNG":
                return dict(getattr(image, "text", {}))
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
            facts = json.loads(comment.removeprefix(_CODE))
            return {name: str(value) for name, value in facts.items()}
    except OSError:
        raise
    except Exception as error:  # strangers' files break readers in many ways
        raise ValueError(f"{type(error).__name__}: {error}") from None
