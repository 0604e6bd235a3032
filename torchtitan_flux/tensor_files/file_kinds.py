"""What a file is that was given as weights and is no safetensors file, by how it begins."""

import zipfile
from pathlib import Path

_BEGINNING = 2048  # bytes
_SHOWN = 80
_AGAIN = (
    "where it was downloaded, that failed: get it again, logged in or with a token (--hf_token) if "
    "the model asks for one"
)
_UNPICKLING = (
    "is a pickle by its contents, and unpickling runs whatever code is in it; give a safetensors "
    "file (where it is trusted: safetensors.torch.save_file writes one)"
)
_UNPACK = "unpack it, and give the safetensors file in it"

_KINDS = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the weights: run `git lfs pull` there"),
    (
        b"GGUF",
        "is a GGUF file, whose weights are quantised; give the safetensors file that it was made "
        "from",
    ),
    *((bytes((0x80, protocol)), _UNPICKLING) for protocol in range(2, 6)),
    (b"\x1f\x8b", f"is compressed by gzip; {_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"is compressed by zstd; {_UNPACK}"),
    (b"BZh", f"is compressed by bzip2; {_UNPACK}"),
    (b"\xfd7zXZ\x00", f"is compressed by xz; {_UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", f"is a 7z archive; {_UNPACK}"),
    (b"Rar!", f"is a RAR archive; {_UNPACK}"),
    (b"\x89HDF\r\n", "is an HDF5 file, of Keras or TensorFlow; give PyTorch's safetensors file"),
    (b"\x93NUMPY", "is a NumPy array; give a safetensors file"),
    (b"\x89PNG\r\n", "is a PNG picture, not weights"),
    (b"\xff\xd8\xff", "is a JPEG picture, not weights"),
)


def other_kind(path: Path) -> str | None:
    """What a file is instead of safetensors and what to do, as "is …"; None where it is not known.

    Args:
        path: a file that is no safetensors file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        begin = file.read(_BEGINNING)
    for magic, kind in _KINDS:
        if begin.startswith(magic):
            return kind
    if begin.startswith(b"PK\x03\x04"):
        return _archive(path)
    return _text(begin)


def _archive(path: Path) -> str:
    """torch.save writes a ZIP archive with a pickle in it; others are unpacked by hand."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return "is a ZIP archive, or a pickle of PyTorch, that was cut off; get it again"
    if any(name.endswith(".pkl") for name in names):
        return _UNPICKLING
    return f"is a ZIP archive; {_UNPACK}"


def _text(begin: bytes) -> str | None:
    """What a server said instead of sending the file."""
    try:
        text = begin.decode("utf-8-sig", errors="strict" if len(begin) < _BEGINNING else "ignore")
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
