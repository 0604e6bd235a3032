"""What a file of weights or data really is, by its first bytes or its name."""

import zipfile
from pathlib import Path

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Suffixes that stand for a pickle, which could run code when it is read."""
HEAD = 2048
"""Bytes by which a file is known."""

LFS_POINTER, WEB_PAGE = "a Git LFS pointer", "a web page"

COMPRESSED = {
    "gzip": b"\x1f\x8b",
    "zstd": b"\x28\xb5\x2f\xfd",
    "xz": b"\xfd7zXZ\0",
    "bzip2": b"BZh",
    "lz4": b"\x04\x22\x4d\x18",
    "zip": b"PK\x03\x04",
    "7z": b"7z\xbc\xaf\x27\x1c",
    "rar": b"Rar!",
}
_KINDS = {
    b"version https://git-lfs": LFS_POINTER,
    b"GGUF": "a GGUF file",
    **{bytes((0x80, protocol)): "a pickle" for protocol in range(2, 6)},
    **{magic: name for name, magic in COMPRESSED.items()},
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x89PNG\r\n": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"ARROW1": "an Arrow file",
    b"PAR1": "a parquet file",
}

_PICKLE = (
    "is a pickle by its {}, and unpickling runs whatever code is in it; give a safetensors file "
    "(where the pickle is trusted: safetensors.torch.save_file writes one)"
)
PICKLE_BY_NAME, _PICKLE_BY_CONTENTS = _PICKLE.format("name"), _PICKLE.format("contents")
_AGAIN = (
    "where it was downloaded, that failed: get it again, logged in or with a token (--hf_token) if "
    "the model asks for one"
)
_INSTEAD = {
    LFS_POINTER: "not the weights: run `git lfs pull` there",
    "a GGUF file": "whose weights are quantised; give the safetensors file it was made from",
}
_SHOWN = 80


def kind_of_bytes(head: bytes) -> str:
    """What begins with these bytes: "a web page", "gzip", ...; "" where that is not known."""
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        return WEB_PAGE
    kind = next((kind for magic, kind in _KINDS.items() if head.startswith(magic)), "")
    return "" if kind == "bzip2" and head[4:10] != b"1AY&SY" else kind


def other_kind(path: Path) -> str | None:
    """What a file is instead of safetensors and what to do, as "is …"; None if not known.

    Raises OSError where it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    kind = kind_of_bytes(head)
    if kind == "zip":  # what torch.save writes: an archive with a pickle in it
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError):
            return "is a ZIP archive, or a pickle of PyTorch, that was cut off; get it again"
        kind = "a pickle" if any(name.endswith(".pkl") for name in names) else kind
    if kind == "a pickle":
        return _PICKLE_BY_CONTENTS
    if kind in COMPRESSED:
        return f"is compressed by {kind}; unpack it, and give the safetensors file in it"
    if kind and kind != WEB_PAGE:
        return f"is {kind}, {_INSTEAD.get(kind, 'not weights; give a safetensors file')}"
    return _text(head)


def _text(head: bytes) -> str | None:
    """What a server said instead of sending the file."""
    try:
        text = head.decode("utf-8-sig", errors="strict" if len(head) < HEAD else "ignore")
    except UnicodeDecodeError:
        return None
    words = " ".join(text.split())
    if not words or not all(one.isprintable() or one.isspace() for one in text):
        return None
    if words[:1] == "<":
        return f"is a web page or XML, not weights; {_AGAIN}"
    what = "a JSON text" if words[:1] in ("{", "[") else "a text"
    shown = words[:_SHOWN] + (" …" if len(words) > _SHOWN else "")
    return f"is {what}, not weights ({shown!r}); {_AGAIN}"
