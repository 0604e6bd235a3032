"""Pictures and captions in the columns of a table: parquet, Arrow, data sets of the hub."""

import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast
from unicodedata import normalize

import pyarrow as pa
from tqdm import tqdm

from torchtitan_flux.data.decode import damage_is_unreadable, header_size
from torchtitan_flux.data.formats import formats
from torchtitan_flux.data.sources.captions import NO_CAPTION, Captions, captions_of, path_inside
from torchtitan_flux.data.sources.columns import picture_in, text_in
from torchtitan_flux.data.sources.index import IndexWriter, Row
from torchtitan_flux.data.sources.index_cache import open_index
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.listing import not_regular
from torchtitan_flux.data.sources.source import SourceOptions, Split, UnreadableItem
from torchtitan_flux.data.sources.tables import ROWS, open_tables

_HEADER = 2**16
"""Bytes of a picture that mostly hold its header: no more of the table is read, then."""


class ParquetSource(IndexedSource):
    """All rows of a table; ids are "<file or set>/<row>".

    Args:
        split: which part is read.
        options: path, image_column, caption_column, index_folder, what they say of captions and of
            pictures.

    Raises:
        OSError, ValueError: there is no table, a column is missing or of another type.
    """

    name = "parquet"

    def __init__(self, split: Split, options: SourceOptions):
        path = str(options.path)
        self._tables = tables = open_tables(split, options)
        self._rows = list(tables.rows.values())
        self._by_line = options.captions_by_line
        self.shared = tables.shared
        self.title, self.place = path, tables.root
        given = "" if Path(path).is_dir() else Path(path).name if Path(path).exists() else path
        columns = [".".join(column or ()) for column in (tables.image, tables.caption)]
        self.identity = json.dumps([given, tables.part, *columns, self._by_line])
        super().__init__(self.name, path, open_index(self, options.index_folder), options)

    def facts(self, stored: Mapping[str, str]) -> dict[str, str]:
        return {
            **self._tables.marks,
            "what is left out": json.dumps(self._tables.left_out),
            "what formats can be read": " ".join(formats()),
        }

    def build(self, writer: IndexWriter, bar: tqdm) -> None:
        for text, names in self._tables.left_out.items():
            writer.note(text, *names)
        bar.total = sum(map(len, self._rows))
        image, caption = self._tables.image[0], self._tables.caption
        for number, (name, table) in enumerate(self._tables.rows.items()):
            row = 0
            for batch in cast(Iterable[pa.Table], table.iter(batch_size=ROWS)):
                texts = batch.column(caption[0]) if caption else None
                for at, picture in enumerate(batch.column(image)):
                    item_id = f"{name}/{row}"
                    captions, reason = (), NO_CAPTION
                    if texts is not None:
                        captions, reason = self._captions_in(texts[at], item_id)
                    length, width, height, wrong = self._size(picture, item_id, writer)
                    what = captions, reason or wrong
                    writer.add(Row(item_id, number, row, length, width, height, *what))
                    row += 1
                bar.update(len(batch))

    def _captions_in(self, scalar: pa.Scalar, item_id: str) -> Captions:
        below = (self._tables.caption or ())[1:]
        try:
            with damage_is_unreadable(item_id):
                text = text_in(scalar.as_py(), below, self._tables.classes, item_id)
                return captions_of(text, self._by_line)
        except UnreadableItem as error:
            return (), error.reason

    def _size(
        self, scalar: pa.Scalar, item_id: str, writer: IndexWriter
    ) -> tuple[int, int, int, str]:
        """(bytes, width, height, what is wrong with it) of a picture."""
        path = ""
        try:
            with damage_is_unreadable(item_id):
                data, path = picture_in(scalar, self._tables.image[1:], item_id)
            if data is not None:
                found = header_size(io.BytesIO(data.slice(0, min(data.size, _HEADER)).to_pybytes()))
                if not found[0] and data.size > _HEADER:
                    found = header_size(io.BytesIO(data.to_pybytes()))
                return data.size, *found
            with _beside(self.place, path, item_id).open("rb") as opened:
                return os.fstat(opened.fileno()).st_size, *header_size(opened)
        except UnreadableItem as error:
            return 0, 0, 0, error.reason
        except OSError as error:
            writer.refused(self.place / path, error, at=0)
            return 0, 0, 0, ""

    def read(self, row: Row) -> bytes:
        with damage_is_unreadable(row.item_id):
            found = cast(pa.Table, self._rows[row.shard][row.offset])
            value = found.column(self._tables.image[0])[0]
            data, path = picture_in(value, self._tables.image[1:], row.item_id)
            if data is not None:
                return data.to_pybytes()
        return _beside(self.place, path, row.item_id).read_bytes()


def _beside(root: Path, path: str, item_id: str) -> Path:
    """The file that a path in a table names, within the folder of the data.

    Raises:
        UnreadableItem: it is outside of that folder, not there, or no regular file.
        OSError: the operating system refuses it.
    """
    spellings = (path, path.replace("\\", "/"))  # a path may have been written on Windows
    spellings += tuple(normalize(form, path) for form in ("NFC", "NFD") for path in spellings)
    try:
        files = [root / path_inside("", spelling) for spelling in spellings]
    except ValueError as error:
        raise UnreadableItem(item_id, f"its path {error}") from error
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise UnreadableItem(item_id, f"{path}: does not exist")
    if what := not_regular(file):
        raise UnreadableItem(item_id, f"{path} is {what}, no file")
    return file
