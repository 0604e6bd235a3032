"""Small pictures, tar shards, tables and what samples hold, for the tests of `data`."""

import io
import struct
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch import Tensor

from torchtitan_flux.data.sources.index import Row
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import Source, SourceOptions, Split, UnreadableItem


def tensors(sample: Any) -> dict[str, Tensor]:
    """All tensors of a sample or batch, by the name of their field."""
    found: dict[str, Tensor] = {}
    for name in (field.name for field in fields(sample)):
        value = getattr(sample, name)
        if is_dataclass(value):
            found |= tensors(value)
        elif isinstance(value, Tensor):
            found[name] = value
    return found


def png(shade: int = 0, size: tuple[int, int] = (5, 3), format: str = "PNG") -> bytes:
    """A gray picture."""
    file = io.BytesIO()
    Image.new("L", size, shade).save(file, format)
    return file.getvalue()


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes], depth=8, kind=0) -> bytes:
    """A PNG of a header and some chunks; gray unless `kind` says 2 (RGB) or 6 (RGBA)."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, body in (header, *chunks, (b"IEND", b"")):
        crc = struct.pack(">I", zlib.crc32(name + body))
        parts.append(struct.pack(">I", len(body)) + name + body + crc)
    return b"".join(parts)


def write_tar(
    path: Path, members: Iterable[tuple[str, bytes | str]], format: int = tarfile.PAX_FORMAT
) -> Path:
    """A tar file of (name, content); names may be repeated."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path: Path, columns: dict) -> Path:
    """A table; columns are lists or Arrow arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def write_samples(kind: str, path: Path, samples: Iterable[tuple[str, bytes, str]]) -> Path:
    """(picture's name, its file, caption) as a folder, or as a shard or a table of that name."""
    samples = list(samples)
    if kind == "parquet":
        pictures = [{"bytes": data, "path": None} for _, data, _ in samples]
        table = {"image": pictures, "text": [text for *_, text in samples]}
        return write_parquet(path.with_name(f"{path.name}.parquet"), table)
    members = [(name, data) for name, data, _ in samples]
    members += [(f"{name.partition('.')[0]}.txt", text.encode()) for name, _, text in samples]
    if kind == "webdataset":
        return write_tar(path.with_name(f"{path.name}.tar"), members)
    path.mkdir(parents=True, exist_ok=True)
    for name, data in members:
        (path / name).write_bytes(data)
    return path


def indexed(name: str, path: Path | str, split: Split = "train", **options) -> IndexedSource:
    """A source of files, whole: nothing is held out."""
    source = build_source(name, split, SourceOptions(path=str(path), **options))
    assert isinstance(source, IndexedSource)
    return source


def refuses(name: str, path: object, message: str, split: Split = "train", **options) -> None:
    """The data cannot be opened, and the message, which names the key, matches."""
    key = "training" if split == "train" else "validation"
    with pytest.raises(ValueError, match=rf"(?s)^(?={key}\.dataset|data\.).*{message}"):
        build_source(name, split, SourceOptions(path=path and str(path), **options))


def rows(source: IndexedSource) -> list[Row]:
    return [source.index[i] for i in range(len(source))]


def ids(source: Source) -> list[str]:
    """Of items whose pictures can be opened."""
    return [source[i].item_id for i in range(len(source))]


def captions(source: IndexedSource) -> dict[str, tuple[str, ...] | str]:
    """id -> captions, or why there are none."""
    return {row.item_id: row.captions or row.reason for row in rows(source)}


def notes(source: IndexedSource) -> dict[str, tuple[str, ...]]:
    """What the index does not hold -> examples."""
    return {note.text: note.examples for note in source.index.notes}


def unreadable(source: Source, index: int) -> str:
    """Why an item cannot be read."""
    with pytest.raises(UnreadableItem) as caught:
        source[index]
    return caught.value.reason
