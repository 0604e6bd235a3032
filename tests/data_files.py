"""Small pictures, tar shards and tables for the tests of `data`."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import SourceOptions, Split


def png(shade: int = 0) -> bytes:
    """A gray picture of 5 x 3 pixels."""
    file = io.BytesIO()
    Image.new("L", (5, 3), shade).save(file, "PNG")
    return file.getvalue()


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


def indexed(name: str, path: Path | str, split: Split = "train", **options) -> IndexedSource:
    """A source of files, whole: nothing is held out."""
    source = build_source(name, split, SourceOptions(path=str(path), **options))
    assert isinstance(source, IndexedSource)
    return source
