"""Pictures and captions in the columns of a table: parquet, Arrow, data sets of the hub."""

import io
import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unicodedata import normalize

import pyarrow as pa
from tqdm import tqdm

from torchtitan_flux.data.decode import damage_is_unreadable, header_size
from torchtitan_flux.data.formats import formats
from torchtitan_flux.data.sources.captions import NO_CAPTION, Captions, captions_of, path_inside
from torchtitan_flux.data.sources.columns import (
    Column,
    caption_column,
    image_column,
    picture_of,
    text_of,
)
from torchtitan_flux.data.sources.foreign import no_plain_file
from torchtitan_flux.data.sources.index import IndexWriter, Row
from torchtitan_flux.data.sources.index_cache import open_index
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.listing import PATH_KEY, given_path
from torchtitan_flux.data.sources.source import Source, SourceOptions, Split, UnreadableItem
from torchtitan_flux.data.sources.split import part_or_share
from torchtitan_flux.data.sources.tables import Table, download_command, open_table

if TYPE_CHECKING:
    from datasets import Dataset

_COCO = "howard-hou/COCO-Text"

_ROWS = 256
"""Rows that are taken from a table at once."""


class ParquetSource(IndexedSource):
    """All rows of a table; ids are "<file or set>/<row>".

    Args:
        split: which part is read, and whose path key messages name.
        options: path, image_column, caption_column, index_folder, what they say of captions and of
            pictures.

    Attributes:
        shared: no table was named for a split, so both splits see all rows.

    Raises:
        ValueError: there is no table, a column is missing or of another type; names the key.
    """

    def __init__(self, split: Split, options: SourceOptions):
        path = given_path(options.path, split, "parquet or Arrow files, or a data set of the hub")
        table = open_table(path, split, options, partial(_names, options=options))
        image, caption = _columns(table.schema, options)
        recipe = _Rows(path, table, image, caption, options.captions_by_line)
        super().__init__("parquet", path, open_index(recipe, options.index_folder), options)
        self.shared = table.shared
        self._root = table.root
        self._image = image
        self._tables = list(table.parts.values())

    def read(self, row: Row) -> bytes:
        with damage_is_unreadable(row.item_id):
            found = cast(pa.Table, self._tables[row.shard][row.offset])
            value = found.column(self._image.name)[0]
            data, path = picture_of(value, self._image.below, row.item_id)
            if data is not None:
                return data.to_pybytes()
        return _beside(self._root, path, row.item_id).read_bytes()


def parquet_source(split: Split, options: SourceOptions) -> Source:
    """One split of the table at `options.path`: its own part, or a share of the rows."""
    source = ParquetSource(split, options)
    return part_or_share(source, source.shared, split, options)


def coco_source(split: Split, options: SourceOptions) -> Source:
    """torchtitan's "coco-validation": a copy of `howard-hou/COCO-Text`."""
    if not options.path:
        raise ValueError(
            f"{PATH_KEY[split]}: not set; download the data with `{download_command(_COCO)}` "
            "and name the folder"
        )
    return parquet_source(split, options)


def _columns(schema: pa.Schema, options: SourceOptions) -> tuple[Column, Column | None]:
    """The columns of pictures and captions; none of captions where none is needed."""
    image = image_column(schema, options.image_column)
    try:
        return image, caption_column(schema, options.caption_column)
    except ValueError:
        if options.caption_column or options.default_caption is None:
            raise
        return image, None  # every row has the default caption


def _names(schema: pa.Schema, options: SourceOptions) -> list[str]:
    columns = _columns(schema, options)
    return list(dict.fromkeys(column.name for column in columns if column))


class _Rows:
    """The recipe of a table's index (`index_cache.Recipe`)."""

    kind = "parquet"

    def __init__(
        self, given: str, table: Table, image: Column, caption: Column | None, by_line: bool
    ):
        self.title = given
        self.place = table.root
        file = Path(given).name if Path(given).is_file() else ""
        self.identity = json.dumps([file, table.part, str(image), str(caption), by_line])
        self._table = table
        self._image, self._caption = image, caption
        self._by_line = by_line

    def facts(self) -> dict[str, str]:
        left_out = json.dumps(self._table.left_out)
        return self._table.facts | {"left out": left_out, "formats": " ".join(formats())}

    def change(self, stored: dict[str, str]) -> str:
        now = self.facts()
        if stored["formats"] != now["formats"]:
            return "other formats can be read"
        return "" if stored == now else "its files have changed"

    def build(self, writer: IndexWriter, bar: tqdm) -> None:
        for text, names in self._table.left_out.items():
            for name in names:
                writer.note(text, name)
        bar.total = len(self._table)
        for number, (name, part) in enumerate(self._table.parts.items()):
            self._add_rows(writer, bar, number, name, part)

    def _add_rows(
        self, writer: IndexWriter, bar: tqdm, number: int, name: str, part: "Dataset"
    ) -> None:
        start = 0
        for batch in cast(Iterable[pa.Table], part.iter(batch_size=_ROWS)):
            pictures = batch.column(self._image.name)
            texts = batch.column(self._caption.name) if self._caption else None
            for at in range(len(batch)):
                item_id = f"{name}/{start + at}"
                captions = (), NO_CAPTION
                if texts is not None:
                    captions = self._captions(texts[at], item_id)
                length, width, height, reason = self._picture(pictures[at], item_id, writer)
                row = (captions[0], captions[1] or reason)
                writer.add(Row(item_id, number, start + at, length, width, height, *row))
            start += len(batch)
            bar.update(len(batch))

    def _captions(self, scalar: pa.Scalar, item_id: str) -> Captions:
        assert self._caption is not None
        try:
            with damage_is_unreadable(item_id):
                text = text_of(scalar.as_py(), self._caption.below, item_id)
                return captions_of(text, item_id, self._by_line), ""
        except UnreadableItem as error:
            return (), error.reason

    def _picture(
        self, scalar: pa.Scalar, item_id: str, writer: IndexWriter
    ) -> tuple[int, int, int, str]:
        """(bytes, width, height, what is wrong with it)."""
        try:
            with damage_is_unreadable(item_id):
                data, path = picture_of(scalar, self._image.below, item_id)
            if data is not None:
                return data.size, *header_size(io.BufferedReader(_BufferFile(data)))
        except UnreadableItem as error:
            return 0, 0, 0, error.reason
        try:
            with _beside(self.place, path, item_id).open("rb") as opened:
                return os.fstat(opened.fileno()).st_size, *header_size(opened)
        except UnreadableItem as error:
            return 0, 0, 0, error.reason
        except OSError as error:
            writer.unopened(self.place / path, error, at=0)
            return 0, 0, 0, ""


class _BufferFile(io.RawIOBase):
    """A buffer as a file, no more of which is touched than is read.

    Arrow's own, `pa.BufferReader`, refuses to seek beyond the end, as decoders do.
    """

    def __init__(self, buffer: pa.Buffer):
        self._bytes = memoryview(buffer).cast("B")
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        piece = self._bytes[self._at : self._at + len(into)]
        into[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = (0, self._at, len(self._bytes))[whence]
        if start + offset < 0:
            raise ValueError("seeks before the beginning")
        self._at = start + offset
        return self._at


def _beside(root: Path, path: str, item_id: str) -> Path:
    """The file that a path in a table names, within the folder of the data.

    Raises:
        UnreadableItem: it is outside of that folder, not there, or no plain file.
        OSError: the operating system refuses it.
    """
    spellings = (path, path.replace("\\", "/"))  # a path may have been written on Windows
    spellings += tuple(normalize(form, path) for form in ("NFC", "NFD") for path in spellings)
    try:
        files = [root / path_inside("", spelling, "its path") for spelling in spellings]
    except ValueError as error:
        raise UnreadableItem(item_id, str(error)) from error
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise UnreadableItem(item_id, f"{path}: does not exist")
    if what := no_plain_file(file):
        raise UnreadableItem(item_id, f"{path} is {what}, no file")
    return file
