"""Where indexes are kept: built once, by one process, and again when the data have changed.

An index lies beside the data in a hidden folder, in a folder that the configuration names, or,
where the data cannot be written to, in the user's cache folder.
"""

import hashlib
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

from tqdm import tqdm

from torchtitan_flux.data.sources.index import DamagedIndex, Index, IndexWriter
from torchtitan_flux.files import sync_folder, try_lock

HIDDEN = ".flux-index"
"""Name of the folder beside the data."""

_TRIED_AGAIN = 2**17  # bytes; what is read at once may have failed anywhere in it

logger = logging.getLogger(__name__)


@runtime_checkable
class Recipe(Protocol):
    """How the index of one data set is made.

    Attributes:
        kind: name of the sort of source.
        title: the data set, for people.
        place: folder of the data, beside which the index is kept.
        identity: tells the indexes that share `place` apart.
    """

    kind: str
    title: str
    place: Path
    identity: str

    def facts(self) -> dict[str, str]:
        """What the rows depend on, as it is now."""
        ...

    def change(self, stored: dict[str, str]) -> str:
        """What differs from the facts of a stored index, in words; "" when nothing does."""
        ...

    def build(self, writer: IndexWriter, bar: tqdm) -> None:
        """Write every row; raises ValueError for data that nobody can train on."""
        ...


def open_index(recipe: Recipe, folder: Path | None = None) -> Index:
    """The index of a data set, built first where there is none that holds.

    Processes that open the same index at once agree: one builds it, the others wait.

    Args:
        recipe: how it is made.
        folder: where to keep it; None for beside the data, or the cache folder of the user.

    Raises:
        ValueError: `folder` cannot be written to, or nobody can train on the data.
    """
    folder = folder and folder.expanduser().absolute()  # workers may stand elsewhere
    if folder and folder.resolve() == recipe.place.resolve():
        folder = None  # an index among the data would be one more file of theirs
    files = [index_file(recipe, place) for place in ([folder] if folder else _places(recipe))]
    for file in files:
        index, _ = _open_if_it_holds(file, recipe)
        if index is not None:
            return index
    refusal = ""
    for file in files:
        try:
            make_folder(file.parent)
            with locked(file.with_suffix(".lock"), recipe.title) as alone:
                return _build(file, recipe, alone)
        except OSError as error:
            if not _is_about(error, file):
                raise
            refusal = error.strerror
    raise ValueError(
        f"data.index_folder: the index of {recipe.title} cannot be written to "
        f"{files[-1].parent} ({refusal}); name a folder that can"
    )


def index_file(recipe: Recipe, folder: Path) -> Path:
    """File of the index in a folder, which may hold those of many data sets."""
    named = recipe.identity
    if folder != recipe.place / HIDDEN:  # beside the data, they may be moved as a whole
        named = f"{recipe.place.resolve()}\n{named}"
    digest = hashlib.blake2b(named.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return folder / f"{recipe.kind}-{digest}.arrow"


def _places(recipe: Recipe) -> list[Path]:
    return [recipe.place / HIDDEN, Path.home() / ".cache" / "torchtitan_flux" / "index"]


def _open_if_it_holds(file: Path, recipe: Recipe) -> tuple[Index | None, str]:
    """The index in a file, or None and why there is none that holds ("" for no file at all)."""
    try:
        index = Index(file)
    except FileNotFoundError:
        return None, ""
    except DamagedIndex as error:
        return None, f"it is damaged ({error})"
    change = recipe.change(index.facts)
    change = change or next((f"{p} can be opened now" for p in index.unopened if can_open(p)), "")
    change = change or next(
        (f"{p} can be read now" for p, at in index.unread if can_open(p, at)), ""
    )
    return (None, change) if change else (index, "")


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


def _build(file: Path, recipe: Recipe, alone: bool) -> Index:
    """Build under the lock, unless another process has done so while this one waited for it."""
    index, change = _open_if_it_holds(file, recipe)
    if index is not None:
        return index
    if change:
        logger.info("The index of %s is built anew: %s", recipe.title, change)
    start = time.monotonic()
    # Facts come before rows: of what changes in between, the next one to open the index hears.
    facts = recipe.facts()
    # One name, so that killed builds leave but one file; where there are no locks, one for each.
    own = "" if alone else f".{socket.gethostname()}-{os.getpid()}"
    unfinished = file.with_suffix(f"{own}.tmp")
    writer = IndexWriter(unfinished, facts)
    try:
        # A bar for those who watch, a line now and then for those who keep the log.
        pause, delay = (0.1, 2.0) if sys.stderr.isatty() else (60.0, 60.0)
        with tqdm(
            desc=f"indexing {recipe.title}", unit=" items", mininterval=pause, delay=delay
        ) as bar:
            recipe.build(writer, bar)
        writer.close()
        os.replace(unfinished, file)
        sync_folder(file.parent)
    except BaseException:
        writer.abandon()
        unfinished.unlink(missing_ok=True)
        raise
    seconds = time.monotonic() - start
    logger.info(
        "Indexed %s: %d items in %.1f s, kept in %s", recipe.title, writer.rows, seconds, file
    )
    return Index(file)


def make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if folder.name == HIDDEN and not (folder / ".gitignore").exists():
        (folder / ".gitignore").write_text("*\n")  # data sets live in repositories, too


@contextmanager
def locked(path: Path, title: str) -> Iterator[bool]:
    """Hold a lock that at most one process has, and that ends with the process.

    False where the file system knows no locks: others may do the same at once.
    """
    with path.open("w") as file:
        taken = try_lock(file.fileno())
        if taken is False:
            logger.info("Another process indexes %s: waiting for it", title)
            try_lock(file.fileno(), wait=True)
        elif taken is None:
            logger.warning("%s: this file system knows no locks; nobody is waited for", path)
        yield taken is not None


def _is_about(error: OSError, file: Path) -> bool:
    """Whether an error is one of the index's folder, not one of the data."""
    return not error.filename or Path(os.fsdecode(error.filename)).is_relative_to(file.parent)
