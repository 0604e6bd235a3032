"""Tables of pictures: parquet and Arrow files, `save_to_disk` folders, data sets of the hub.

Rows are read through memory maps; `datasets` converts the columns of parquet files that are read
into Arrow files, once, where indexes are kept.
"""

import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict
from tqdm import tqdm

from torchtitan_flux.data.decode import damage_is_unreadable, header_size
from torchtitan_flux.data.sources import index_cache, listing
from torchtitan_flux.data.sources.captions import NO_CAPTION, Captions, captions_of, path_inside
from torchtitan_flux.data.sources.columns import (
    caption_column,
    class_names,
    image_column,
    picture_in,
    plain_type,
    text_in,
)
from torchtitan_flux.data.sources.index import IndexWriter, Row
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.source import SettingError, SourceOptions, Split, UnreadableItem
from torchtitan_flux.data.sources.split import part_of, split_files
from torchtitan_flux.paths import is_hub_name

logger = logging.getLogger(__name__)

_COMPRESSED = re.compile(r"\.(parquet|arrow)\.(gz|zst|xz|bz2|lz4|zip)$", re.IGNORECASE)
_ROWS = 256  # that are converted, or taken from a table, at once
_HEADER = 2**16  # bytes of a picture that mostly hold its header: no more of it is read, then


class ParquetSource(IndexedSource):
    """All rows of the tables of one split, one table after the other; ids are "<table>/<row>".

    The path is a folder, a file, or owner/name of the hub. ValueError where there is nothing to
    read, or it is damaged, a column is missing or of another type, or tables differ in one.
    """

    name = "parquet"

    def __init__(self, split: Split, options: SourceOptions):
        self.title = path = str(options.path)
        self._by_line = options.captions_by_line
        local = Path(path).absolute()
        self.place = local if local.is_dir() else local.parent
        undecodable: list[str] = []
        if not local.exists():
            self.place = Path.home() / ".cache" / "torchtitan_flux"
            found = _from_hub(path)
        elif (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            with _damage_is_named(local):
                found = datasets.load_from_disk(str(local))
        elif local.is_dir():
            found, undecodable = _files(local, options.index_folder)
        else:
            found = local
        parted = isinstance(found, dict)
        found = {str(name): of for name, of in found.items()} if parted else {local.name: found}
        parts = {name: part_of(name) if parted else "" for name in found}
        part, self.shared, names, left_out = split_files(parts, split, path)
        tables = {name: _opened(found[name]) for name in names}
        self.left_out = left_out | {
            "tables without rows": [name for name, table in tables.items() if not table.rows],
            listing.NOT_UTF8: undecodable,
        }
        tables = {name: table for name, table in tables.items() if table.rows}
        if not tables:
            raise ValueError(f"{path} holds no row")
        self._marks = {name: table.mark for name, table in tables.items()}
        schema = _merged([table.schema for table in tables.values()])
        self._image, self._caption = image_column(schema, options.image_column), None
        try:
            self._caption = caption_column(schema, options.caption_column)
        except SettingError:
            if options.caption_column or options.default_caption is None:
                raise  # else every row has the default caption
        self._classes = class_names(schema, self._caption) if self._caption else []
        read = [column for column in (self._image, self._caption) if column]
        columns = _common_columns(tables, schema, sorted({column[0] for column in read}))
        parquet = {name: table.rows for name, table in tables.items() if table.data is None}
        converted = _converted(self.place, parquet, columns, options.index_folder)
        self._tables = [
            (table.data or converted[name]).select_columns(columns.names).with_format("arrow")
            for name, table in tables.items()
        ]
        given = "" if local.is_dir() else local.name if local.exists() else path
        self.identity = json.dumps([given, part, *map(".".join, read), self._by_line])
        index = index_cache.open_index(self, options.index_folder)
        super().__init__(self.name, path, index, options)

    def facts(self, stored: Mapping[str, str]) -> dict[str, str]:
        return self._marks

    def build(self, writer: IndexWriter, bar: tqdm) -> None:
        bar.total = sum(map(len, self._tables))
        for number, (name, table) in enumerate(zip(self._marks, self._tables, strict=True)):
            row = 0
            for batch in cast(Iterable[pa.Table], table.iter(batch_size=_ROWS)):
                texts = batch.column(self._caption[0]) if self._caption else [None] * len(batch)
                for picture, text in zip(batch.column(self._image[0]), texts, strict=True):
                    item_id = f"{name}/{row}"
                    captions, reason = self._captions_in(text, item_id)
                    length, (width, height, wrong) = self._size(picture, item_id, writer)
                    what = captions, reason or wrong
                    writer.add(Row(item_id, number, row, length, width, height, *what))
                    row += 1
                bar.update(len(batch))

    def _captions_in(self, scalar: pa.Scalar | None, item_id: str) -> Captions:
        if self._caption is None or scalar is None:
            return (), NO_CAPTION
        try:
            with damage_is_unreadable(item_id):
                text = text_in(scalar.as_py(), self._caption[1:], self._classes, item_id)
                return captions_of(text, self._by_line)
        except UnreadableItem as error:
            return (), error.reason

    def _size(
        self, scalar: pa.Scalar, item_id: str, writer: IndexWriter
    ) -> tuple[int, tuple[int, int, str]]:
        """(bytes, what `header_size` says) of a picture."""
        path = ""
        try:
            with damage_is_unreadable(item_id):
                data, path = picture_in(scalar, self._image[1:], item_id)
            if data is not None:
                found = header_size(io.BytesIO(data.slice(0, min(data.size, _HEADER)).to_pybytes()))
                if not found[0] and data.size > _HEADER:
                    found = header_size(io.BytesIO(data.to_pybytes()))
                return data.size, found
            with _beside(self.place, path, item_id).open("rb") as opened:
                return os.fstat(opened.fileno()).st_size, header_size(opened)
        except UnreadableItem as error:
            return 0, (0, 0, error.reason)
        except OSError as error:
            writer.refused(self.place / path, error, at=0)
            return 0, (0, 0, "")

    def read(self, row: Row) -> bytes:
        with damage_is_unreadable(row.item_id):
            found = cast(pa.Table, self._tables[row.shard][row.offset])
            value = found.column(self._image[0])[0]
            data, path = picture_in(value, self._image[1:], row.item_id)
            if data is not None:
                return data.to_pybytes()
        return _beside(self.place, path, row.item_id).read_bytes()


class _Table(NamedTuple):
    """A table before its columns are chosen; `data` is None where they have to be converted."""

    schema: pa.Schema
    rows: int
    mark: str
    data: Dataset | None


def _opened(found: Path | Dataset) -> _Table:
    if isinstance(found, Dataset):
        files = [Path(file["filename"]) for file in found.cache_files]
        mark = " ".join([found._fingerprint, *map(listing.stamp, files)])
        return _Table(found.data.schema, len(found), mark, found)
    if what := listing.not_regular(found):
        raise ValueError(f"{found} is {what}")
    with _damage_is_named(found):
        if found.suffix.lower() == ".parquet":
            with pq.ParquetFile(found) as file:
                return _Table(file.schema_arrow, file.metadata.num_rows, listing.stamp(found), None)
        data = Dataset.from_file(str(found))
        return _Table(data.data.schema, len(data), listing.stamp(found), data)


def _files(folder: Path, index_folder: Path | None) -> tuple[dict[str, Path], list[str]]:
    """(the tables below a folder by their names, folders of files whose names are not UTF-8)."""
    names, undecodable, refused = listing.files_below(folder, index_folder)
    if refused:
        raise refused[0][1]
    if compressed := next(filter(_COMPRESSED.search, names), None):
        raise ValueError(f"{folder / compressed} is compressed: unpack it")
    found = {n: folder / n for n in names if n.lower().endswith((".parquet", ".arrow"))}
    if not found:
        raise ValueError(f"{folder} holds no .parquet or .arrow file")
    return found, undecodable


def _merged(schemas: list[pa.Schema]) -> pa.Schema:
    """The columns of the first table; those of nulls as the first other one has them."""
    first, *others = schemas
    fields = {field.name: field for field in first}
    for field in (field for schema in others for field in schema):
        if field.name in fields and pa.types.is_null(fields[field.name].type):
            fields[field.name] = field
    return pa.schema(list(fields.values()), first.metadata)


def _common_columns(tables: Mapping[str, _Table], merged: pa.Schema, names: list[str]) -> pa.Schema:
    """The columns that are read, which must have one type in all tables; nulls fit any."""
    columns = {name: plain_type(merged.field(name).type) for name in names}
    for table, (schema, *_) in tables.items():
        for column, of in columns.items():
            found = [plain_type(field.type) for field in schema if field.name == column]
            if len(found) != 1:
                many = f"{len(found)} columns" if found else "no column"
                raise ValueError(f"{table} has {many} {column!r}, it should be one")
            if found[0] != of and not pa.types.is_null(found[0]):
                raise ValueError(
                    f"column {column!r} is {found[0]} in {table}, {of} in {next(iter(tables))}"
                )
    return pa.schema(list(columns.items()))


@contextmanager
def _damage_is_named(file: Path) -> Iterator[None]:
    """Whatever pyarrow and datasets raise: the file is named, and what it is instead of a table."""
    try:
        yield
    except SettingError:
        raise
    except Exception as error:
        what, name = "", str(file)
        with suppress(OSError), file.open("rb") as opened:
            what = listing.foreign_content(opened.read(listing.HEAD), file.name)
        if not what and isinstance(error, OSError) and error.strerror:
            what, name = f"cannot be opened: {error.strerror}", str(error.filename or file)
        text = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{name} {what or f'cannot be read as a table: {text[0]}'}") from error


def _converted(
    root: Path, counts: dict[str, int], columns: pa.Schema, index_folder: Path | None
) -> dict[str, Dataset]:
    """Columns of parquet files, whose numbers of rows are given, as tables."""
    if not counts:
        return {}
    files = [str(root / name) for name in counts]

    def convert(folder: Path) -> Dataset:
        # One process converts, the others wait and find it done.
        with index_cache.locked(folder / "parquet.lock", str(root)):
            logger.info("%s: %d parquet files, converted once into %s", root, len(files), folder)
            return datasets.load_dataset(
                "parquet",
                data_files=files,
                split="train",
                cache_dir=str(folder / "parquet"),
                columns=columns.names,
                batch_size=_ROWS,  # else as many as the first group holds, which may be none
                features=datasets.Features.from_arrow_schema(columns),
            )  # pyright: ignore[reportReturnType]

    datasets.disable_progress_bars()  # of which every process would print several
    what = f"the rows of {root}"
    with _damage_is_named(root):
        table = index_cache.in_first_writable(index_cache.places(index_folder, root), what, convert)
    assert len(table) == sum(counts.values())
    tables, start = {}, 0
    for name, count in counts.items():
        tables[name] = table.select(range(start, start + count))
        start += count
    return tables


def _from_hub(name: str) -> DatasetDict | Dataset:
    if "/" not in name or not is_hub_name(name):
        raise ValueError(f"{name} does not exist")
    datasets.enable_progress_bars()
    try:
        return datasets.load_dataset(name)  # pyright: ignore[reportReturnType]
    except Exception as error:  # of a dozen types: no network, no such name, several configurations
        raise ValueError(
            f"{name} is neither here nor available from the hub "
            f"({' '.join(str(error).split())[:200]}); download it with `hf download {name} "
            f"--repo-type dataset --local-dir {name.split('/')[-1]}` and name the folder"
        ) from error


def _beside(root: Path, path: str, item_id: str) -> Path:
    """The file that a path in a table names, within the folder of the data."""
    try:
        file = root / path_inside(root, "", path)
        what = listing.not_regular(file)
    except ValueError as error:
        raise UnreadableItem(item_id, f"its path {error}") from error
    except FileNotFoundError as error:
        raise UnreadableItem(item_id, f"{path}: does not exist") from error
    if what:
        raise UnreadableItem(item_id, f"{path} is {what}, no file")
    return file
