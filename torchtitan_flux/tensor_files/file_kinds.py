"""What a file of weights or data really is, by its first bytes or its name."""

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

PICKLE = (
    "is a pickle, and unpickling runs whatever code is in it; give a safetensors file (where the "
    "pickle is trusted: safetensors.torch.save_file writes one)"
)
_REMEDIES = {
    LFS_POINTER: "run `git lfs pull` there",
    "a GGUF file": "its weights are quantised; give the safetensors file it was made from",
    WEB_PAGE: "the download failed: get it again, logged in or with a token (--hf_token) if the "
    "model asks for one",
}


def kind_of_bytes(head: bytes) -> str:
    """What begins with these bytes: "a web page", "gzip", ...; "" where that is not known."""
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        return WEB_PAGE
    kind = next((kind for magic, kind in _KINDS.items() if head.startswith(magic)), "")
    return "" if kind == "bzip2" and head[4:10] != b"1AY&SY" else kind


def other_kind(path: Path) -> str:
    """What a file is instead of safetensors and what to do, as "is …"; empty if not known.

    Raises OSError where it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    kind = kind_of_bytes(head)
    if kind in ("a pickle", "zip"):  # torch.save writes an archive with a pickle in it
        return PICKLE
    if not kind and head.lstrip()[:1] in (b"<", b"{"):  # XML or JSON: what a server answered
        kind = WEB_PAGE
    return (
        f"is {kind}, not weights; {_REMEDIES.get(kind, 'give a safetensors file')}" if kind else ""
    )
