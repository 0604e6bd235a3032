"""Files that are not what their names say: pointers, web pages, compressed files, pipes."""

import stat
from pathlib import Path

HEAD = 512
"""Bytes that tell."""

_LFS = b"version https://git-lfs"

_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd", ".zst"),
    b"\xfd7zXZ\0": ("xz", "unxz", ".xz"),
    b"BZh": ("bzip2", "bunzip2", ".bz2"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4", ".lz4"),
    b"PK\x03\x04": ("zip", "unzip", ".zip"),
}


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file is what Git leaves in place of a large one, by its first bytes."""
    return head.startswith(_LFS)


def foreign_content(head: bytes, name: str) -> str:
    """What a file is instead, and what to do about it, to be read after its name; "" if unknown.

    Args:
        head: the first `HEAD` bytes of the file, or all of a shorter one.
        name: of the file, without its folders.
    """
    if not head:
        return "is empty"
    if is_lfs_pointer(head):
        return "is a Git LFS pointer, run `git lfs pull`"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page: download the file itself"
    if head.startswith(b"ARROW1"):
        return "is an Arrow file for random access (Feather), not a stream: write it as parquet"
    if head.startswith(b"PAR1") and not name.lower().endswith(".parquet"):
        return "is a parquet file under another name: rename it to .parquet"
    for magic, (packed, command, suffix) in _PACKED.items():
        if head.startswith(magic) and (packed != "bzip2" or head[4:10] == b"1AY&SY"):
            return (
                f"is {packed} under another name: unpack it "
                f"(`mv {name} {name}{suffix} && {command} {name}{suffix}`)"
            )
    return ""


def no_plain_file(path: Path) -> str:
    """What a path is that opening might wait for or never end; "" for a plain file.

    Raises:
        OSError: the operating system refuses to say, or there is none.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return ""
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((what for test, what in kinds.items() if test(mode)), "a device")
