"""Opening tables: parquet and Arrow files, `save_to_disk` folders, data sets of the hub.

Rows are read through memory maps. Parquet is converted once, by `datasets`, into Arrow files that
are kept where indexes are kept.
"""

import bisect
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan_flux.data.files import PATH_KEY, walk
from torchtitan_flux.data.index_cache import HIDDEN, locked, make_folder
from torchtitan_flux.data.parts import own_parts, part_of
from torchtitan_flux.data.sources import SourceOptions, Split

if TYPE_CHECKING:
    from datasets import Dataset

_SUFFIXES = (".parquet", ".arrow")

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


class Table:
    """Rows of several `datasets` tables one after the other, as seen from one split.

    Attributes:
        parts: name of each table, and the table.
        shared: no table was named for a split, so both splits see all rows.
    """

    def __init__(self, parts: Mapping[str, "Dataset"], shared: bool):
        self.parts = dict(parts)
        self.shared = shared
        self._ends = list(itertools.accumulate(len(part) for part in self.parts.values()))
        self._names = list(self.parts)

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def features(self) -> dict[str, Any]:
        """Columns and their `datasets` types, those of the first table."""
        return dict(next(iter(self.parts.values())).features)

    def mapped(self, change: Callable[["Dataset"], "Dataset"]) -> "Table":
        """The same rows of changed tables."""
        return Table({name: change(part) for name, part in self.parts.items()}, self.shared)

    def place(self, index: int) -> tuple[str, int]:
        """(name of the table, row in it); IndexError outside."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a table of {len(self)}")
        which = bisect.bisect_right(self._ends, index)
        return self._names[which], index - (self._ends[which - 1] if which else 0)

    def row(self, index: int) -> dict[str, Any]:
        """Values of one row by column."""
        name, row = self.place(index)
        return self.parts[name][row]


def open_table(path: str, split: Split, options: SourceOptions, download: str = "") -> Table:
    """The rows of one split.

    Tables that are named after a part (train-00000.parquet, test/0.parquet, parts of a
    `save_to_disk` folder) belong to it; "held_out" is the validation part, else the test part.

    Args:
        path: a folder, a file, or owner/name of the hub.
        split: "train" or "held_out".
        options: index_folder.
        download: hub name for the message that tells how to get the data; "" takes `path`.

    Raises:
        ValueError: there is nothing to read, or it is damaged; names the key of the path.
    """
    local = Path(path).expanduser()
    if not local.exists():
        if _HUB_NAME.fullmatch(path):
            return _choose(_from_hub(path, split, download or path), split, path)
        raise ValueError(f"{PATH_KEY[split]}: {path} does not exist")
    local = local.absolute()
    try:
        saved = _saved(local)
        if saved is not None:
            return _choose(saved, split, path)
        return _from_files(local, split, path, options.index_folder)
    except OSError as error:
        raise ValueError(f"{PATH_KEY[split]}: {path} cannot be read: {error}") from error


def download_command(name: str) -> str:
    """What a user types to get a data set of the hub."""
    return f"hf download {name} --repo-type dataset --local-dir {name.split('/')[-1]}"


def _choose(tables: "dict[str, Dataset]", split: Split, path: str) -> Table:
    """The table of a split among those of the hub's parts, under the names of these."""
    own = own_parts(set(tables), split, path)
    if own is None:
        return Table(tables, shared=True)
    return Table({own[0]: tables[own[0]]}, shared=own[1])


def _saved(path: Path) -> "dict[str, Dataset] | None":
    """What `save_to_disk` wrote to a folder; None when it wrote nothing there."""
    if not ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        return None
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(path))
    if isinstance(saved, DatasetDict):
        return {str(part): table for part, table in saved.items()}
    return {path.name: saved}


def _from_files(path: Path, split: Split, given: str, index_folder: Path | None) -> Table:
    root = path.parent if path.is_file() else path
    names = [path.name]
    if path.is_dir():
        names = [n for d in walk(path) for n in d.paths() if n.endswith(_SUFFIXES)]
    names = [name for name in names if name.endswith(_SUFFIXES)]
    if not names:
        raise ValueError(f"{PATH_KEY[split]}: {given} holds no {' or '.join(_SUFFIXES)} file")
    parts = {name: part_of(name) for name in names} if path.is_dir() else {}
    own = own_parts({part for part in parts.values() if part}, split, given)
    if own is not None:
        names = [name for name in names if parts[name] == own[0]]
    parquet = [name for name in names if name.endswith(".parquet")]
    tables = {}
    for name in names:
        if name not in parquet:
            with _damage_is_named(root / name, split):
                tables[name] = _from_arrow(root / name)
    rows = {}
    for name in parquet:
        with _damage_is_named(root / name, split):
            rows[name] = _rows_of(root / name)
    rows = {name: count for name, count in rows.items() if count}
    if rows:
        with _damage_is_named(path, split):
            tables |= _from_parquet(root, rows, index_folder)
    tables = {name: tables[name] for name in names if len(tables.get(name, ()))}
    if not tables:
        raise ValueError(f"{PATH_KEY[split]}: {given} holds no row")
    return Table(tables, shared=own is None or own[1])


@contextmanager
def _damage_is_named(file: Path, split: Split) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # pyarrow and datasets raise sorts of their own
        if str(error).startswith("data.index_folder"):
            raise
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{PATH_KEY[split]}: {file} cannot be read as a table: {reason[0]}"
        ) from error


def _from_arrow(file: Path) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_file(str(file))


def _rows_of(file: Path) -> int:
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(file).num_rows


def _from_parquet(
    root: Path, rows: dict[str, int], index_folder: Path | None
) -> "dict[str, Dataset]":
    """Files of known numbers of rows as tables."""
    from datasets import Dataset, load_dataset

    folder = _cache_folder(root, index_folder)
    files = [str(root / name) for name in rows]
    # One process converts, the others wait and find it done.
    with locked(folder.parent / "parquet.lock", str(root)):
        table = load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder))
    assert isinstance(table, Dataset)
    assert len(table) == sum(rows.values())
    ends = itertools.accumulate(rows.values())
    return {
        name: table.select(range(end - rows[name], end))
        for name, end in zip(rows, ends, strict=True)
    }


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
