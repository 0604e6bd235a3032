"""Which formats of images are read: what the installed Pillow and its plug-ins decode."""

import functools
import os
from contextlib import suppress
from importlib import import_module

from PIL import Image

# data.max_image_pixels is the only limit.
Image.MAX_IMAGE_PIXELS = None

# Tried first, in this order.
_COMMON = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000", "BMP", "PPM")
_REFUSED = {
    "EPS",  # starts Ghostscript
    "IPTC",  # opens what it holds as whatever that may be, EPS too
    *("BUFR", "GRIB", "HDF5", "WMF", "MPEG"),  # recognised, but not decoded
}

_PLUG_INS = {  # format -> (package, suffixes)
    "HEIF": ("pillow-heif", {".heic", ".heif", ".hif"}),
    "JXL": ("pillow-jxl-plugin", {".jxl"}),
}
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that are tried on a file, those that any file might pass for last."""
    Image.init()
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    with suppress(ImportError):
        import_module("pillow_jxl")
    suffixed = set(Image.registered_extensions().values())
    known = [name for name in Image.OPEN if name in suffixed and name not in _REFUSED]
    others = [name for name in known if name not in _COMMON]
    others.sort(key=lambda name: (Image.OPEN[name][1] is None, name))
    return (*(name for name in _COMMON if name in known), *others)


_KNOWN = {*formats(), "MPO"}  # which JPEG's decoder opens; plug-ins are registered by now
IMAGE_SUFFIXES = {s for s, name in Image.registered_extensions().items() if name in _KNOWN}
IMAGE_SUFFIXES.update(*(suffixes for _, suffixes in _PLUG_INS.values()))
"""Of files that are taken for pictures, those of missing plug-ins too: lower case, with the dot."""


def is_picture(file: str) -> bool:
    """Whether a file is one by its suffix."""
    return os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES


def unread_format(head: bytes) -> str:
    """What package a file would need, by its first bytes, to be read after its name; or ""."""
    jxl = head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"))
    heif = head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS
    name = "JXL" if jxl else "HEIF" if heif else ""
    if not name or name in formats():
        return ""
    return f"is a picture in the format {name}, which `pip install {_PLUG_INS[name][0]}` reads"
