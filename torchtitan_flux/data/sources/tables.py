"""Opening tables: parquet and Arrow files, `save_to_disk` folders, data sets of the hub.

Rows are read through memory maps. Of parquet, the columns that are read are converted once, by
`datasets`, into Arrow files that are kept where indexes are kept.
"""

import itertools
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict

from torchtitan_flux.data.sources.columns import (
    Column,
    caption_column,
    class_names,
    image_column,
    plain_type,
)
from torchtitan_flux.data.sources.index_cache import in_first_writable, locked, places
from torchtitan_flux.data.sources.listing import (
    HEAD,
    NOT_UTF8,
    foreign_content,
    not_regular,
    stamp,
    walk,
)
from torchtitan_flux.data.sources.parts import not_read, own_parts, part_of
from torchtitan_flux.data.sources.source import SettingError, SourceOptions, Split

logger = logging.getLogger(__name__)

_COMPRESSED = re.compile(r"\.(parquet|arrow)\.(gz|zst|xz|bz2|lz4|zip)$", re.IGNORECASE)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)

ROWS = 256
"""Rows that are converted, or taken from a table, at once."""


class Tables(NamedTuple):
    """Rows of several tables one after the other, as seen from one split.

    Attributes:
        root: folder of the data.
        rows: name of each table, and the table, which gives Arrow tables of the columns below.
        image, caption: the columns that are read; no caption where each row has the default one.
        classes: what numbers in the caption column stand for.
        part: which part of the data this is; "" where no part is named.
        shared: no table was named for a split, so both splits see all rows.
        left_out: names of what is there and not read, by why.
        marks: of each table, to tell whether its rows are the same as before.
    """

    root: Path
    rows: dict[str, Dataset]
    image: Column
    caption: Column | None
    classes: list[str]
    part: str
    shared: bool
    left_out: dict[str, list[str]]
    marks: dict[str, str]


def open_tables(split: Split, options: SourceOptions) -> Tables:
    """The rows of one split, pictures undecoded.

    Tables that are named after a part (train-00000.parquet, test/0.parquet, parts of a
    `save_to_disk` folder) belong to it; "held_out" is the validation part, else the test part.

    Args:
        split: "train" or "held_out".
        options: path (a folder, a file, or owner/name of the hub), index_folder, image_column,
            caption_column, default_caption.

    Raises:
        OSError, ValueError: there is nothing to read, or it is damaged, or tables differ in a
            column.
    """
    path = str(options.path)
    local = Path(path).absolute()
    root = local if local.is_dir() else local.parent
    nameless: list[str] = []
    if not local.exists():
        root = Path.home() / ".cache" / "torchtitan_flux"
        found = _from_hub(path)
    elif (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
        with _damage_is_named(local):
            found = datasets.load_from_disk(str(local))
    elif local.is_dir():
        found, nameless = _files(local, options.index_folder)
    else:
        found = local
    parted = isinstance(found, dict)
    found = {str(name): of for name, of in found.items()} if parted else {local.name: found}
    parts = {name: part_of(name) if parted else "" for name in found}
    own = own_parts(parts.values(), split, path)
    left_out = not_read(parts, own)
    tables = {
        name: _opened(of) for name, of in found.items() if own is None or parts[name] == own[0]
    }
    left_out["tables without rows"] = [name for name, table in tables.items() if not table.count]
    left_out[NOT_UTF8] = nameless
    tables = {name: table for name, table in tables.items() if table.count}
    if not tables:
        raise ValueError(f"{path} holds no row")
    merged = _merged({name: table.schema for name, table in tables.items()})
    image, caption = image_column(merged, options.image_column), None
    try:
        caption = caption_column(merged, options.caption_column)
    except SettingError:
        if options.caption_column or options.default_caption is None:
            raise
    columns = _common_columns(tables, merged, {column[0] for column in (image, caption) if column})
    parquet = {name: table.count for name, table in tables.items() if table.data is None}
    converted = _converted(root, parquet, columns, options.index_folder) if parquet else {}
    rows = {
        name: (converted[name] if table.data is None else table.data)
        .select_columns(columns.names)
        .with_format("arrow")
        for name, table in tables.items()
    }
    return Tables(
        root,
        rows,
        image,
        caption,
        class_names(merged, caption) if caption else [],
        *(own or ("", True)),
        left_out,
        {name: table.mark for name, table in tables.items()},
    )


class _Table(NamedTuple):
    """A table before its columns are chosen; `data` is None where they have to be converted."""

    schema: pa.Schema
    count: int
    mark: str
    data: Dataset | None


def _opened(found: Path | Dataset) -> _Table:
    if isinstance(found, Dataset):
        files = [Path(file["filename"]) for file in found.cache_files]
        mark = " ".join([found._fingerprint, *map(stamp, files)])
        return _Table(found.data.schema, len(found), mark, found)
    with _damage_is_named(found):
        if what := not_regular(found):
            raise ValueError(f"it is {what}")
        if found.suffix.lower() == ".parquet":
            with pq.ParquetFile(found) as file:
                return _Table(file.schema_arrow, file.metadata.num_rows, stamp(found), None)
        data = Dataset.from_file(str(found))
        return _Table(data.data.schema, len(data), stamp(found), data)


def _files(folder: Path, index_folder: Path | None) -> tuple[dict[str, Path], list[str]]:
    """(the tables below a folder by their names, folders of files whose names are not UTF-8)."""
    names, nameless = [], []
    for directory in walk(folder, index_folder):
        if directory.error:
            raise directory.error
        names += directory.paths()
        nameless += [directory.name or str(folder)] * directory.unnameable
    if compressed := next(filter(_COMPRESSED.search, names), None):
        raise ValueError(f"{folder / compressed} is compressed: unpack it")
    found = {n: folder / n for n in names if n.lower().endswith((".parquet", ".arrow"))}
    if not found:
        raise ValueError(f"{folder} holds no .parquet or .arrow file")
    return found, nameless


def _merged(schemas: Mapping[str, pa.Schema]) -> pa.Schema:
    """The columns of the first table; those of nulls as the first other one has them."""
    first, *others = schemas.values()
    fields = {field.name: field for field in first}
    for field in (field for schema in others for field in schema):
        if field.name in fields and pa.types.is_null(fields[field.name].type):
            fields[field.name] = field
    return pa.schema(list(fields.values()), first.metadata)


def _common_columns(tables: Mapping[str, _Table], merged: pa.Schema, names: set[str]) -> pa.Schema:
    """The columns that are read, which all tables must have alike; a column of nulls is like any.

    Raises:
        ValueError: a table lacks one or has it of another type; names both.
    """
    columns = {name: plain_type(merged.field(name).type) for name in sorted(names)}
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
    """pyarrow and datasets raise sorts of their own: what is said is what the file is instead."""
    try:
        yield
    except Exception as error:
        what = ""
        with suppress(OSError):
            if file.is_file():
                with file.open("rb") as opened:
                    what = foreign_content(opened.read(HEAD), file.name)
        if not what and isinstance(error, OSError) and error.strerror:
            other = error.filename if str(error.filename or file) != str(file) else ""
            what = f"cannot be opened: {other}{': ' if other else ''}{error.strerror}"
        said = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{file} {what or f'cannot be read as a table: {said[0]}'}") from error


def _converted(
    root: Path, counts: dict[str, int], columns: pa.Schema, index_folder: Path | None
) -> dict[str, Dataset]:
    """Columns of parquet files of known numbers of rows, as tables."""
    files = [str(root / name) for name in counts]

    def convert(folder: Path) -> Dataset:
        # One process converts, the others wait and find it done.
        with locked(folder / "parquet.lock", str(root)):
            logger.info("%s: %d parquet files, converted once into %s", root, len(files), folder)
            return datasets.load_dataset(
                "parquet",
                data_files=files,
                split="train",
                cache_dir=str(folder / "parquet"),
                columns=columns.names,
                batch_size=ROWS,  # else as many as the first group holds, which may be none
                features=datasets.Features.from_arrow_schema(columns),
            )  # pyright: ignore[reportReturnType]

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # of which every process would print several
    try:
        with _damage_is_named(root):
            table = in_first_writable(places(index_folder, root), f"the rows of {root}", convert)
    finally:
        if shown:
            datasets.enable_progress_bars()
    assert len(table) == sum(counts.values())
    ends = itertools.accumulate(counts.values())
    return {
        name: table.select(range(end - count, end))
        for (name, count), end in zip(counts.items(), ends, strict=True)
    }


def _from_hub(name: str) -> DatasetDict | Dataset:
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(f"{name} does not exist")
    try:
        return datasets.load_dataset(name)  # pyright: ignore[reportReturnType]
    except Exception as error:  # of a dozen sorts: no network, no such name, several configurations
        raise ValueError(
            f"{name} is neither here nor available from the hub "
            f"({' '.join(str(error).split())[:200]}); download it with `hf download {name} "
            f"--repo-type dataset --local-dir {name.split('/')[-1]}` and name the folder"
        ) from error
