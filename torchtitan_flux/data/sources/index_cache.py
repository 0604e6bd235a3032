"""Where indexes are kept: built once, by one process, and again when the data have changed.

An index lies in a hidden folder beside the data, in the folder that the configuration names, or,
where the data cannot be written to, in the user's cache folder.
"""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from tqdm import tqdm

from torchtitan_flux.data.formats import formats
from torchtitan_flux.data.sources.index import DamagedIndex, Index, IndexWriter
from torchtitan_flux.data.sources.source import INDEX_FOLDER, SettingError
from torchtitan_flux.files import replacing, try_lock

HIDDEN = ".flux-index"
"""Name of the folder beside the data."""

_READ_BYTES = 2**17  # what is read at once may have failed anywhere in it

logger = logging.getLogger(__name__)
T = TypeVar("T")


@runtime_checkable
class Recipe(Protocol):
    """How the index of one data set is made."""

    name: str  # the kind of source
    title: str  # the data set, for people
    place: Path  # folder of the data, beside which the index is kept
    identity: str  # tells the indexes that share `place` apart
    left_out: dict[str, list[str]]  # why files are not read -> their names; noted in the index

    def facts(self, stored: Mapping[str, str]) -> dict[str, str]:
        """What the rows depend on, name -> mark; `stored`: those of an index, {} without any."""
        ...

    def build(self, writer: IndexWriter, bar: tqdm) -> None:
        """Write every row; raises ValueError for data that nobody can train on."""
        ...


def open_index(recipe: Recipe, folder: Path | None = None) -> Index:
    """The index of a data set; where none is up to date, one process builds it, others wait.

    ValueError where it cannot be written, or nobody can train on the data.
    """
    folders = places(folder, recipe.place)
    for place in folders:
        index, _ = _open_current(index_file(recipe, place), recipe)
        if index is not None:
            return index
    what = f"the index of {recipe.title}"
    return in_first_writable(folders, what, lambda place: _build(index_file(recipe, place), recipe))


def places(folder: Path | None, data: Path) -> list[Path]:
    """Folders that may keep what is made of the data: the one that is named, else the usual."""
    if folder and folder.resolve() != data.resolve():  # one more file of theirs, else
        return [folder]
    return [data / HIDDEN, Path.home() / ".cache" / "torchtitan_flux" / "index"]


def in_first_writable(folders: list[Path], what: str, make: Callable[[Path], T]) -> T:
    """What `make` makes in the first of the folders that can be written to."""
    reason = None
    for folder in folders:
        try:
            return make(folder)
        except OSError as error:
            if error.filename and not str(error.filename).startswith(str(folder)):
                raise  # of the data
            reason = error.strerror or error
    message = f"{what} cannot be written to {folders[-1]} ({reason}); name another folder"
    raise SettingError(INDEX_FOLDER, message)


def index_file(recipe: Recipe, folder: Path) -> Path:
    """File of the index in a folder, which may hold those of many data sets."""
    named = recipe.identity
    if folder != recipe.place / HIDDEN:  # beside the data, they may be moved as a whole
        named = f"{recipe.place.resolve()}\n{named}"
    digest = hashlib.blake2b(named.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return folder / f"{recipe.name}-{digest}.arrow"


def _open_current(file: Path, recipe: Recipe) -> tuple[Index | None, str]:
    """The index if it is up to date, else None and why not ("" where there is no file)."""
    try:
        index = Index(file)
    except FileNotFoundError:
        return None, ""
    except DamagedIndex as error:
        return None, f"it is damaged ({error})"
    change = difference(index.facts, _facts(recipe, index.facts))
    if not change:
        change = next((f"{p} can be read now" for p, at in index.refused if can_open(p, at)), "")
    return (None, change) if change else (index, "")


def _facts(recipe: Recipe, stored: Mapping[str, str]) -> dict[str, str]:
    return {
        "what formats can be read": " ".join(formats()),
        "what is left out": json.dumps(recipe.left_out),
        **recipe.facts(stored),
    }


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The first of the facts that differs, in words; "" when none does."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            how = "has changed" if name in now else "is gone"
            return f"{name} {how if name in before else 'is new'}"
    return "" if list(before) == list(now) else "its files come in another order"


def can_open(path: str, at: int | None = None) -> bool:
    """Whether the system lets a file or folder be opened, and a file be read from byte `at`."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if at is not None:
                os.pread(opened, _READ_BYTES, at)
        finally:
            os.close(opened)
    except OSError:
        return False
    return True


def _build(file: Path, recipe: Recipe) -> Index:
    """Build under the lock, unless another process has done so while this one waited for it."""
    with locked(file.with_suffix(".lock"), recipe.title):
        index, change = _open_current(file, recipe)
        if index is not None:
            return index
        if change:
            logger.info("The index of %s is built anew: %s", recipe.title, change)
        start = time.monotonic()
        # A bar on a terminal, a line a minute in a log.
        pause, delay = (0.1, 2.0) if sys.stderr.isatty() else (60.0, 60.0)
        title = f"indexing {recipe.title}"
        # Facts come before rows: a change in between is noticed by whoever opens the index next.
        facts = _facts(recipe, {})
        with (
            replacing(file) as unfinished,
            IndexWriter(unfinished, facts) as writer,
            tqdm(desc=title, unit=" items", mininterval=pause, delay=delay) as bar,
        ):
            for text, names in recipe.left_out.items():
                writer.note(text, *names)
            recipe.build(writer, bar)
        took = time.monotonic() - start
        indexed = "Indexed %s: %d items in %.1f s, kept in %s"
        logger.info(indexed, recipe.title, writer.rows, took, file)
        return Index(file)


@contextmanager
def locked(path: Path, title: str) -> Iterator[None]:
    """Hold a lock that ends with the process; what killed processes left unfinished is removed.

    Where the file system has no locks, a warning says so, and others may do the same at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent.name == HIDDEN and not (path.parent / ".gitignore").exists():
        (path.parent / ".gitignore").write_text("*\n")  # data sets live in repositories, too
    with path.open("w") as file:
        held = try_lock(file.fileno())
        if held is False:
            logger.info("Another process indexes %s: waiting for it", title)
            held = try_lock(file.fileno(), wait=True)
        if held:
            for left in path.parent.glob(f".{path.stem}.*.partial"):
                left.unlink()
        else:
            logger.warning("%s: this file system has no locks; several may build at once", path)
        yield
