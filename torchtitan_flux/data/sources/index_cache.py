"""Where indexes are kept: built once, by one process, and again when the data have changed.

An index lies beside the data in a hidden folder, in a folder that the configuration names, or,
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

_TRIED_AGAIN = 2**17  # bytes; what is read at once may have failed anywhere in it

logger = logging.getLogger(__name__)
T = TypeVar("T")


@runtime_checkable
class Recipe(Protocol):
    """How the index of one data set is made.

    Attributes:
        name: the sort of source.
        title: the data set, for people.
        place: folder of the data, beside which the index is kept.
        identity: tells the indexes that share `place` apart.
        left_out: names of what is there and not read, by why; noted in the index.
    """

    name: str
    title: str
    place: Path
    identity: str
    left_out: dict[str, list[str]]

    def facts(self, stored: Mapping[str, str]) -> dict[str, str]:
        """What the rows depend on, name -> mark; `stored`: those of an index, {} without any."""
        ...

    def build(self, writer: IndexWriter, bar: tqdm) -> None:
        """Write every row; raises ValueError for data that nobody can train on."""
        ...


def open_index(recipe: Recipe, folder: Path | None = None) -> Index:
    """The index of a data set, built first where there is none that holds.

    Processes that open the same index at once agree: one builds it, the others wait. ValueError
    where it cannot be written, or nobody can train on the data.
    """
    folders = places(folder, recipe.place)
    for place in folders:
        index, _ = _open_if_it_holds(index_file(recipe, place), recipe)
        if index is not None:
            return index

    def build(folder: Path) -> Index:
        file = index_file(recipe, folder)
        with locked(file.with_suffix(".lock"), recipe.title):
            return _build(file, recipe)

    return in_first_writable(folders, f"the index of {recipe.title}", build)


def places(folder: Path | None, data: Path) -> list[Path]:
    """Folders that may keep what is made of the data: the one that is named, else the usual."""
    if folder and folder.resolve() != data.resolve():  # one more file of theirs, else
        return [folder]
    return [data / HIDDEN, Path.home() / ".cache" / "torchtitan_flux" / "index"]


def in_first_writable(folders: list[Path], what: str, make: Callable[[Path], T]) -> T:
    """What `make` makes in the first of the folders that can be written to."""
    refusal = None
    for folder in folders:
        try:
            return make(folder)
        except OSError as error:
            if error.filename and not str(error.filename).startswith(str(folder)):
                raise  # of the data
            refusal = error.strerror or error
    message = f"{what} cannot be written to {folders[-1]} ({refusal}); name another folder"
    raise SettingError(INDEX_FOLDER, message)


def index_file(recipe: Recipe, folder: Path) -> Path:
    """File of the index in a folder, which may hold those of many data sets."""
    named = recipe.identity
    if folder != recipe.place / HIDDEN:  # beside the data, they may be moved as a whole
        named = f"{recipe.place.resolve()}\n{named}"
    digest = hashlib.blake2b(named.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return folder / f"{recipe.name}-{digest}.arrow"


def _open_if_it_holds(file: Path, recipe: Recipe) -> tuple[Index | None, str]:
    """The index in a file, or None and why there is none that holds ("" for no file at all)."""
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
    """Whether the operating system lets a file or folder be opened, a file be read at a byte."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if at is not None:
                os.pread(opened, _TRIED_AGAIN, at)
        finally:
            os.close(opened)
    except OSError:
        return False
    return True


def _build(file: Path, recipe: Recipe) -> Index:
    """Build under the lock, unless another process has done so while this one waited for it."""
    index, change = _open_if_it_holds(file, recipe)
    if index is not None:
        return index
    if change:
        logger.info("The index of %s is built anew: %s", recipe.title, change)
    start = time.monotonic()
    # A bar for those who watch, a line now and then for those who keep the log.
    pause, delay = (0.1, 2.0) if sys.stderr.isatty() else (60.0, 60.0)
    title = f"indexing {recipe.title}"
    # Facts come before rows: of what changes in between, the next one to open the index hears.
    facts = _facts(recipe, {})
    with (
        replacing(file) as unfinished,
        IndexWriter(unfinished, facts) as writer,
        tqdm(desc=title, unit=" items", mininterval=pause, delay=delay) as bar,
    ):
        for text, names in recipe.left_out.items():
            writer.note(text, *names)
        recipe.build(writer, bar)
    seconds = time.monotonic() - start
    logger.info(
        "Indexed %s: %d items in %.1f s, kept in %s", recipe.title, writer.rows, seconds, file
    )
    return Index(file)


@contextmanager
def locked(path: Path, title: str) -> Iterator[None]:
    """Hold a lock that at most one process has, and that ends with the process.

    Where the file system knows no locks, a warning says so, and others may do the same at once.
    What killed processes left unfinished in the folder is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent.name == HIDDEN and not (path.parent / ".gitignore").exists():
        (path.parent / ".gitignore").write_text("*\n")  # data sets live in repositories, too
    with path.open("w") as file:
        taken = try_lock(file.fileno())
        if taken is False:
            logger.info("Another process indexes %s: waiting for it", title)
            taken = try_lock(file.fileno(), wait=True)
        if taken:
            for left in path.parent.glob(f".{path.stem}.*.partial"):
                left.unlink()
        else:
            logger.warning("%s: this file system knows no locks; nobody is waited for", path)
        yield
