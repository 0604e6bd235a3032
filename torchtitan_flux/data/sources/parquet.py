"""Tables of pictures: parquet and Arrow files, `save_to_disk` folders, data sets of the hub.

Rows are read through memory maps; `datasets` converts the columns of parquet files that are read
into Arrow files, once, where indexes are kept.
"""

import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict
from tqdm import tqdm

from torchtitan_flux.data.decode import damage_is_unreadable, header_size
from torchtitan_flux.data.sources import indexed, listing
from torchtitan_flux.data.sources.captions import CAPTION_NAMES, NO_CAPTION, Captions, captions_of
from torchtitan_flux.data.sources.index import IndexWriter, Row
from torchtitan_flux.data.sources.source import (
    CAPTION_COLUMN,
    IMAGE_COLUMN,
    SettingError,
    SourceOptions,
    Split,
    UnreadableItem,
)
from torchtitan_flux.data.sources.split import part_of, split_files
from torchtitan_flux.formatting import listed
from torchtitan_flux.paths import is_hub_name

logger = logging.getLogger(__name__)

_COMPRESSED = re.compile(r"\.(parquet|arrow)\.(gz|zst|xz|bz2|lz4|zip)$", re.IGNORECASE)
_ROWS = 256  # that are converted, or taken from a table, at once


class ParquetSource(indexed.IndexedSource):
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
        left_out: list[str] = []
        if not local.exists():
            self.place = Path.home() / ".cache" / "torchtitan_flux"
            found = _from_hub(path)
        elif (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            with _damage_is_named(local):
                found = datasets.load_from_disk(str(local))
        elif local.is_dir():
            found, left_out = _files(local, options.index_folder)
        else:
            found = local
        parted = isinstance(found, dict)
        found = {str(name): of for name, of in found.items()} if parted else {local.name: found}
        parts = {name: part_of(name) if parted else "" for name in found}
        part, self.shared, names, others = split_files(parts, split, path)
        tables = {name: _opened(found[name]) for name in names}
        empty = [name for name, table in tables.items() if not table.rows]
        self.left_out = others | {"tables without rows": empty, listing.LEFT_OUT: left_out}
        tables = {name: table for name, table in tables.items() if table.rows}
        if not tables:
            raise ValueError(f"{path} holds no row")
        self._marks = {name: table.mark for name, table in tables.items()}
        schema = next(iter(tables.values())).schema
        self._image = _column(
            schema, IMAGE_COLUMN, options.image_column, ("image",), _holds_pictures
        )
        self._caption, named = None, options.caption_column
        try:
            fits = _holds_text_or_classes if named else _holds_text
            self._caption = _column(schema, CAPTION_COLUMN, named, CAPTION_NAMES, fits)
        except SettingError:
            if named or options.default_caption is None:
                raise  # else every row has the default caption
        self._classes = _class_names(schema, self._caption)
        read = [name for name in (self._image, self._caption) if name]
        columns = _common_columns(tables, list(dict.fromkeys(read)))
        parquet = {name: table.rows for name, table in tables.items() if table.data is None}
        converted = _converted(self.place, parquet, columns, options.index_folder)
        self._tables = [
            (table.data or converted[name]).select_columns(columns.names).with_format("arrow")
            for name, table in tables.items()
        ]
        given = "" if local.is_dir() else local.name if local.exists() else path
        self.identity = json.dumps([given, part, *read, self._by_line])
        index = indexed.open_index(self, options.index_folder)
        super().__init__(self.name, path, index, options)

    def facts(self) -> dict[str, str]:
        return self._marks

    def build(self, writer: IndexWriter, bar: tqdm) -> None:
        bar.total = sum(map(len, self._tables))
        for number, (name, table) in enumerate(zip(self._marks, self._tables, strict=True)):
            row = 0
            for batch in cast(Iterable[pa.Table], table.iter(batch_size=_ROWS)):
                texts = batch.column(self._caption) if self._caption else [None] * len(batch)
                for picture, text in zip(batch.column(self._image), texts, strict=True):
                    item_id = f"{name}/{row}"
                    captions, reason = self._captions_in(text, item_id)
                    length, width, height, wrong = 0, 0, 0, ""
                    try:
                        data = _picture_in(picture, item_id)
                        length = len(data)
                        width, height, wrong = header_size(io.BytesIO(data))
                    except UnreadableItem as error:
                        wrong = error.reason
                    what = captions, wrong or reason
                    writer.add(Row(item_id, number, row, length, width, height, *what))
                    row += 1
                bar.update(len(batch))

    def _captions_in(self, scalar: pa.Scalar | None, item_id: str) -> Captions:
        if scalar is None:
            return (), NO_CAPTION
        try:
            with damage_is_unreadable(item_id):
                value = scalar.as_py()
        except UnreadableItem as error:
            return (), error.reason
        if isinstance(value, int):
            known = 0 <= value < len(self._classes)
            value = self._classes[value] if known else str(value)
        return captions_of(value, self._by_line)

    def read(self, row: Row) -> bytes:
        with damage_is_unreadable(row.item_id):
            found = cast(pa.Table, self._tables[row.shard][row.offset])
            return _picture_in(found.column(self._image)[0], row.item_id)


def _column(
    schema: pa.Schema,
    key: str,
    named: str,
    usual: tuple[str, ...],
    fits: Callable[[pa.DataType], bool],
) -> str:
    """The column that is named, else of a usual name, in any case where none is spelled so; of
    pictures, also the only one."""
    fitting = [field.name for field in schema if fits(_plain(field.type))]
    names, wanted = (schema.names, (named,)) if named else (fitting, usual)
    exact = [[name for name in names if name == one] for one in wanted]
    in_any_case = [[name for name in names if name.lower() == one.lower()] for one in wanted]
    found = next(filter(None, exact + in_any_case), [])
    if not (found or named) and key == IMAGE_COLUMN:
        found = fitting
    if len(found) == 1 and found[0] in fitting:
        return found[0]
    what = "encoded images" if key == IMAGE_COLUMN else "text"
    raise SettingError(
        key,
        f"{' or '.join(map(repr, wanted))} has to be one column that holds {what}; those that do: "
        f"{listed(fitting, 20) or 'none'}; all columns: {listed(schema.names, 20)}",
    )


def _plain(of: pa.DataType) -> pa.DataType:
    """One type for all that store the same: views, dictionaries, 32 or 64 bits of offsets."""
    types = pa.types
    if types.is_dictionary(of):
        return _plain(of.value_type)
    if types.is_struct(of):
        return pa.struct([(field.name, _plain(field.type)) for field in of])
    if types.is_list(of) or types.is_large_list(of):
        return pa.list_(_plain(of.value_type))
    if types.is_string(of) or types.is_large_string(of) or types.is_string_view(of):
        return pa.string()
    if types.is_binary(of) or types.is_large_binary(of) or types.is_binary_view(of):
        return pa.large_binary()
    return of


def _holds_text(of: pa.DataType) -> bool:
    return pa.types.is_string(of.value_type if pa.types.is_list(of) else of)


def _holds_text_or_classes(of: pa.DataType) -> bool:
    return _holds_text(of) or pa.types.is_integer(of)


def _holds_pictures(of: pa.DataType) -> bool:
    if pa.types.is_struct(of) and of.get_field_index("bytes") >= 0:
        of = of.field("bytes").type
    return pa.types.is_large_binary(of)


def _picture_in(scalar: Any, item_id: str) -> bytes:
    """The file of a picture."""
    if scalar.is_valid and isinstance(scalar, pa.StructScalar):
        scalar = scalar["bytes"]
    if not scalar.is_valid:
        raise UnreadableItem(item_id, "has no image")
    return scalar.as_py()


def _class_names(schema: pa.Schema, column: str | None) -> list[str]:
    """What `datasets` says that the numbers in a column stand for; [] where it says nothing."""
    try:
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return stored["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return []


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
    if not found.is_file():
        raise ValueError(f"{found} {listing.missing(found)}")
    with _damage_is_named(found):
        if found.suffix.lower() == ".parquet":
            with pq.ParquetFile(found) as file:
                return _Table(file.schema_arrow, file.metadata.num_rows, listing.stamp(found), None)
        data = Dataset.from_file(str(found))
        return _Table(data.data.schema, len(data), listing.stamp(found), data)


def _files(folder: Path, index_folder: Path | None) -> tuple[dict[str, Path], list[str]]:
    """(the tables below a folder by their names, what is left out of it)."""
    names, left_out = listing.files_below(folder, index_folder)
    if compressed := next(filter(_COMPRESSED.search, names), None):
        raise ValueError(f"{folder / compressed} is compressed: unpack it")
    found = {n: folder / n for n in names if n.lower().endswith((".parquet", ".arrow"))}
    if not found:
        raise ValueError(f"{folder} holds no .parquet or .arrow file")
    return found, left_out


def _common_columns(tables: Mapping[str, _Table], names: list[str]) -> pa.Schema:
    """The columns that are read, which must have one type in all tables."""
    columns: dict[str, pa.DataType] = {}
    for table, (schema, *_) in tables.items():
        for column in names:
            found = [_plain(field.type) for field in schema if field.name == column]
            if len(found) != 1:
                raise ValueError(f"{table} has {len(found)} columns {column!r}, it should be one")
            of = columns.setdefault(column, found[0])
            if found[0] != of:
                raise ValueError(f"column {column!r} is {found[0]} in {table}, {of} before")
    return pa.schema(list(columns.items()))


@contextmanager
def _damage_is_named(file: Path) -> Iterator[None]:
    """Whatever pyarrow and datasets raise: the file is named, and what it is instead of a table."""
    try:
        yield
    except SettingError:
        raise
    except Exception as error:
        what = ""
        with suppress(OSError), file.open("rb") as opened:
            what = listing.foreign_content(opened.read(listing.HEAD), file.name)
        text = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ValueError(f"{file} {what or f'cannot be read as a table: {text}'}") from error


def _converted(
    root: Path, counts: dict[str, int], columns: pa.Schema, index_folder: Path | None
) -> dict[str, Dataset]:
    """Columns of parquet files, whose numbers of rows are given, as tables."""
    if not counts:
        return {}
    files = [str(root / name) for name in counts]

    def convert(folder: Path) -> Dataset:
        # One process converts, the others wait and find it done.
        with indexed.locked(folder / "parquet.lock", str(root)):
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
        table = indexed.in_first_writable(indexed.places(index_folder, root), what, convert)
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
