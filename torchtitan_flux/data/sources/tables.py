"""Opening tables: parquet and Arrow files, `save_to_disk` folders, data sets of the hub.

Rows are read through memory maps. Of parquet, the columns that are read are converted once, by
`datasets`, into Arrow files that are kept where indexes are kept.
"""

import bisect
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pyarrow as pa
import pyarrow.parquet as pq

from torchtitan_flux.data.sources.columns import plain_type
from torchtitan_flux.data.sources.foreign import HEAD, foreign_content, no_plain_file
from torchtitan_flux.data.sources.index_cache import HIDDEN, locked, make_folder
from torchtitan_flux.data.sources.listing import PATH_KEY, walk
from torchtitan_flux.data.sources.parts import PARTS, not_read, own_parts, part_of
from torchtitan_flux.data.sources.source import SourceOptions, Split

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_SUFFIXES = (".parquet", ".arrow")

_PACKED = re.compile(r"\.(parquet|arrow)\.(gz|zst|xz|bz2|lz4|zip)$", re.IGNORECASE)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)

_ROWS = 256
"""Rows that are converted at once."""

_NO_ROWS = "tables without rows"


class Table:
    """Rows of several `datasets` tables one after the other, as seen from one split.

    Attributes:
        root: folder of the data.
        parts: name of each table, and the table, whose rows and batches are Arrow tables.
        part: which part of the data this is; "" where no part is named.
        schema: the columns that are read.
        shared: no table was named for a split, so both splits see all rows.
        left_out: names of what is there and not read, by why.
        facts: what the rows depend on, to tell whether they are the same as before.
    """

    def __init__(
        self,
        root: Path,
        parts: Mapping[str, "Dataset"],
        schema: pa.Schema,
        part: str,
        shared: bool,
        left_out: Mapping[str, list[str]],
        facts: Mapping[str, str],
    ):
        self.root = root
        self.parts = {name: table.with_format("arrow") for name, table in parts.items()}
        self.schema = schema
        self.part = part
        self.shared = shared
        self.left_out = dict(left_out)
        self.facts = dict(facts)
        self._ends = list(itertools.accumulate(len(part) for part in self.parts.values()))
        self._names = list(self.parts)

    def __len__(self) -> int:
        return self._ends[-1]

    def place(self, index: int) -> tuple[str, int]:
        """(name of the table, row in it); IndexError outside."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a table of {len(self)}")
        which = bisect.bisect_right(self._ends, index)
        return self._names[which], index - (self._ends[which - 1] if which else 0)

    def row(self, index: int) -> pa.Table:
        """One row."""
        name, row = self.place(index)
        return cast(pa.Table, self.parts[name][row])


Choose = Callable[[pa.Schema], Sequence[str]]
"""Which columns are read of a table; raises ValueError where they are not there."""


def open_table(
    path: str, split: Split, options: SourceOptions, choose: Choose, download: str = ""
) -> Table:
    """The rows of one split, pictures undecoded.

    Tables that are named after a part (train-00000.parquet, test/0.parquet, parts of a
    `save_to_disk` folder) belong to it; "held_out" is the validation part, else the test part.

    Args:
        path: a folder, a file, or owner/name of the hub.
        split: "train" or "held_out".
        options: index_folder.
        choose: the columns that are read; the others do not matter.
        download: hub name for the message that tells how to get the data; "" takes `path`.

    Raises:
        ValueError: there is nothing to read, or it is damaged, or tables differ in a column;
            names the key of the path.
    """
    local = Path(path).expanduser().absolute()
    try:
        if not local.exists():
            if _HUB_NAME.fullmatch(path):
                return _of_parts(_from_hub(path, split, download or path), split, path, choose)
            raise ValueError(f"{PATH_KEY[split]}: {path} does not exist")
        saved = _saved(local, split)
        if saved is not None:
            return _of_parts(saved, split, path, choose)
        return _from_files(local, split, path, options.index_folder, choose)
    except OSError as error:
        what = error.filename or path
        raise ValueError(f"{PATH_KEY[split]}: {what} cannot be read: {error.strerror}") from error


def download_command(name: str) -> str:
    """What a user types to get a data set of the hub."""
    return f"hf download {name} --repo-type dataset --local-dir {name.split('/')[-1]}"


def _of_parts(tables: "dict[str, Dataset]", split: Split, path: str, choose: Choose) -> Table:
    """The table of a split among those of the hub's parts, under the names of these."""
    own = own_parts(set(tables), split, path)
    left_out = not_read({name: name if name in PARTS else "" for name in tables}, own)
    if own is not None:
        tables = {own[0]: tables[own[0]]}
    left_out[_NO_ROWS] = [name for name, table in tables.items() if not len(table)]
    tables = {name: table for name, table in tables.items() if len(table)}
    if not tables:
        raise ValueError(f"{PATH_KEY[split]}: {path} holds no row")
    schemas = {name: table.features.arrow_schema for name, table in tables.items()}
    columns = _common_columns(schemas, choose, f"{PATH_KEY[split]}: {path}")
    files = [Path(f["filename"]) for table in tables.values() for f in table.cache_files]
    stamps = {name: table._fingerprint for name, table in tables.items()}
    stamps |= {file.name: _stamp(file) for file in files}
    root = Path(path).expanduser().absolute()
    if not root.is_dir():  # of the hub
        root = files[0].parent if files else Path.home() / ".cache" / "torchtitan_flux"
    return Table(
        root,
        {name: table.select_columns(columns.names) for name, table in tables.items()},
        columns,
        *(own or ("", True)),
        left_out,
        {"tables": json.dumps(stamps)},
    )


def _common_columns(schemas: Mapping[str, pa.Schema], choose: Choose, where: str) -> pa.Schema:
    """The columns that are read, which all tables must have alike; a column of nulls is like any.

    Raises:
        ValueError: a table lacks one or has it of another type; names both.
    """
    first, *others = schemas
    fields = {field.name: field for field in schemas[first]}
    for name in others:
        for field in schemas[name]:
            if field.name in fields and pa.types.is_null(fields[field.name].type):
                fields[field.name] = field
    schema = pa.schema(list(fields.values()), schemas[first].metadata)
    chosen = {name: plain_type(schema.field(name).type) for name in choose(schema)}
    for name, schema in schemas.items():
        for column, of in chosen.items():
            found = [plain_type(field.type) for field in schema if field.name == column]
            if len(found) != 1:
                many = f"{len(found)} columns" if found else "no column"
                raise ValueError(f"{where}: {name} has {many} {column!r}, it should be one")
            if found[0] != of and not pa.types.is_null(found[0]):
                raise ValueError(
                    f"{where}: column {column!r} is {found[0]} in {name}, {of} in {first}"
                )
    return pa.schema(list(chosen.items()))


def _saved(path: Path, split: Split) -> "dict[str, Dataset] | None":
    """What `save_to_disk` wrote to a folder; None when it wrote nothing there."""
    if not ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        return None
    from datasets import DatasetDict, load_from_disk

    with _damage_is_named(path, split):
        saved = load_from_disk(str(path))
    if isinstance(saved, DatasetDict):
        return {str(part): table for part, table in saved.items()}
    return {path.name: saved}


def _from_files(
    path: Path, split: Split, given: str, index_folder: Path | None, choose: Choose
) -> Table:
    root = path if path.is_dir() else path.parent
    names, nameless = [path.name], []
    if path.is_dir():
        directories = list(walk(path, index_folder))
        names = [name for directory in directories for name in directory.paths()]
        nameless = [d.name or given for d in directories for _ in range(d.unnameable)]
    if packed := [name for name in names if _PACKED.search(name)]:
        raise ValueError(f"{PATH_KEY[split]}: {root / packed[0]} is compressed: unpack it")
    names = [name for name in names if name.lower().endswith(_SUFFIXES)]
    if not names:
        raise ValueError(f"{PATH_KEY[split]}: {given} holds no {' or '.join(_SUFFIXES)} file")
    parts = {name: part_of(name) if path.is_dir() else "" for name in names}
    own = own_parts(set(parts.values()) - {""}, split, given)
    left_out = not_read(parts, own)
    if own is not None:
        names = [name for name in names if parts[name] == own[0]]
    arrow: dict[str, Dataset] = {}
    schemas, rows = {}, {}
    for name in names:
        with _damage_is_named(root / name, split):
            if what := no_plain_file(root / name):
                raise ValueError(f"{what} is no file")
            if name.lower().endswith(".parquet"):
                with pq.ParquetFile(root / name) as opened:
                    schemas[name], rows[name] = opened.schema_arrow, opened.metadata.num_rows
            else:
                arrow[name] = _from_arrow(root / name)
                schemas[name] = arrow[name].data.schema
                rows[name] = len(arrow[name])
    left_out[_NO_ROWS] = [name for name in names if not rows[name]]
    left_out["files whose names are not UTF-8 are left out"] = nameless
    names = [name for name in names if rows[name]]
    if not names:
        raise ValueError(f"{PATH_KEY[split]}: {given} holds no row")
    columns = _common_columns({n: schemas[n] for n in names}, choose, f"{PATH_KEY[split]}: {given}")
    parquet = {name: rows[name] for name in names if name not in arrow}
    tables = {n: table.select_columns(columns.names) for n, table in arrow.items() if rows[n]}
    if parquet:
        with _damage_is_named(path, split):
            tables |= _from_parquet(root, parquet, columns, index_folder)
    facts = {"files": json.dumps([[name, _stamp(root / name)] for name in names])}
    tables = {name: tables[name] for name in names}
    return Table(root, tables, columns, *(own or ("", True)), left_out, facts)


def _stamp(file: Path) -> str:
    found = file.stat()
    return f"{found.st_size}:{found.st_mtime_ns}"


@contextmanager
def _damage_is_named(file: Path, split: Split) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # pyarrow and datasets raise sorts of their own
        if str(error).startswith("data.index_folder"):
            raise
        raise ValueError(f"{PATH_KEY[split]}: {file} {_what_is_wrong(file, error)}") from error


def _what_is_wrong(file: Path, error: Exception) -> str:
    """Why a file cannot be read: what it is instead, or what was said when it was read."""
    with suppress(OSError):
        if not no_plain_file(file):
            with file.open("rb") as opened:
                head = opened.read(HEAD)
            if what := foreign_content(head, file.name):
                return what
    if isinstance(error, OSError) and error.strerror:
        other = error.filename if str(error.filename or file) != str(file) else ""
        return f"cannot be opened: {other}{': ' if other else ''}{error.strerror}"
    reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return f"cannot be read as a table: {reason[0]}"


def _from_arrow(file: Path) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_file(str(file))


def _from_parquet(
    root: Path, rows: dict[str, int], columns: pa.Schema, index_folder: Path | None
) -> "dict[str, Dataset]":
    """Columns of files of known numbers of rows, as tables."""
    from datasets import Dataset, Features, load_dataset

    folder = _cache_folder(root, index_folder)
    files = [str(root / name) for name in rows]
    logger.info("%s: %d parquet files are converted once, into %s", root, len(files), folder)
    # One process converts, the others wait and find it done.
    with locked(folder.parent / "parquet.lock", str(root)), _without_bars():
        table = load_dataset(
            "parquet",
            data_files=files,
            split="train",
            cache_dir=str(folder),
            columns=columns.names,
            batch_size=_ROWS,  # else as many as the first group holds, which may be none
            features=Features.from_arrow_schema(columns),
        )
    assert isinstance(table, Dataset)
    assert len(table) == sum(rows.values())
    ends = itertools.accumulate(rows.values())
    return {
        name: table.select(range(end - rows[name], end))
        for name, end in zip(rows, ends, strict=True)
    }


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the progress bars of `datasets`, of which every process would print several."""
    from datasets.utils.logging import (
        disable_progress_bar,
        enable_progress_bar,
        is_progress_bar_enabled,
    )

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def _cache_folder(root: Path, index_folder: Path | None) -> Path:
    """Where converted tables are kept: the first place that can be written to."""
    home = Path.home() / ".cache" / "torchtitan_flux" / "index"
    refusal = None
    for place in [index_folder] if index_folder else [root / HIDDEN, home]:
        try:
            make_folder(place)
            (place / "parquet").mkdir(exist_ok=True)
        except OSError as error:
            refusal = error
            continue
        if os.access(place / "parquet", os.W_OK):
            return place / "parquet"
    raise ValueError(
        f"data.index_folder: the rows of {root} cannot be written to "
        f"{index_folder or home} ({refusal or 'read-only'}); name a folder that can"
    )


def _from_hub(name: str, split: Split, download: str) -> "dict[str, Dataset]":
    from datasets import Dataset, DatasetDict, load_dataset

    try:
        found = load_dataset(name)
    except Exception as error:  # of a dozen sorts: no network, no such name, several configurations
        raise ValueError(
            f"{PATH_KEY[split]}: {name} is neither here nor to be had from the hub "
            f"({' '.join(str(error).split())[:200]}); download it with "
            f"`{download_command(download)}` and name the folder"
        ) from error
    if isinstance(found, DatasetDict):
        return {str(part): table for part, table in found.items()}
    assert isinstance(found, Dataset)
    return {name: found}
