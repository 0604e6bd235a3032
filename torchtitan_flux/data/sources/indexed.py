"""What all sources of files share: an index of their items, and pictures read on demand.

An index lies in a hidden folder beside the data, in the folder that the configuration names, or,
where the data cannot be written to, in the user's cache folder. It is built once, by one process,
and again when the data have changed.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

import hashlib
import json
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool
from tqdm import tqdm

from torchtitan_flux.data.decode import open_image
from torchtitan_flux.data.formats import formats
from torchtitan_flux.data.sources.captions import NO_CAPTION
from torchtitan_flux.data.sources.index import Index, IndexWriter, Row
from torchtitan_flux.data.sources.source import (
    INDEX_FOLDER,
    Item,
    SettingError,
    SourceOptions,
    UnreadableItem,
)
from torchtitan_flux.files import replacing, try_lock

HIDDEN = ".flux-index"
"""Name of the folder beside the data."""

logger = logging.getLogger(__name__)
T = TypeVar("T")


class IndexedSource(ABC):
    """Items of an index.

    Attributes:
        name: the kind of source.
        title: the data set, for people.
        shared: both splits see all items, since none is named for a split.
        place: folder of the data, beside which the index is kept.
        identity: tells the indexes that share `place` apart.
        left_out: why files are not read -> their names; noted in the index.
    """

    name: str
    title: str
    shared = True
    place: Path
    identity: str
    left_out: dict[str, list[str]]

    def __init__(self, name: str, title: str, index: Index, options: SourceOptions):
        self.name = name
        self.title = title
        self.index = index
        self.options = options

    @abstractmethod
    def read(self, row: Row) -> bytes:
        """The file of a row's picture; raises UnreadableItem or OSError."""

    def facts(self) -> dict[str, str]:
        """What the rows depend on, name -> mark."""
        raise NotImplementedError

    def build(self, writer: IndexWriter, bar: tqdm) -> None:
        """Write every row; raises ValueError for data that nobody can train on."""
        raise NotImplementedError

    @property
    def digest(self) -> str:
        return self.index.digest

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Item:
        row = self.index[index]
        captions = self.captions(row)
        if not captions:
            raise UnreadableItem(row.item_id, row.reason)
        try:
            data = self.read(row)
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            reason = "does not exist" if gone else str(error.strerror)
            raise UnreadableItem(row.item_id, reason) from error
        image = open_image(data, row.item_id, self.options.max_pixels)
        return Item(image, captions, row.item_id)

    def captions(self, row: Row) -> tuple[str, ...]:
        """The captions that a row is trained with; empty where it has none."""
        captions = row.captions
        if not captions and row.reason == NO_CAPTION and self.options.default_caption is not None:
            captions = (self.options.default_caption,)
        return tuple(self.options.caption_prefix + caption for caption in captions)

    def usable(self, rows: pa.RecordBatch) -> Bool[np.ndarray, " rows"]:
        """Which rows of the index have a caption and, by its header, a picture to train on."""
        captioned = pc.greater(pc.list_value_length(rows["captions"]), 0)
        if self.options.default_caption is not None:
            captioned = pc.or_(captioned, pc.equal(rows["reason"], NO_CAPTION))
        width, height = (rows[name].to_numpy().astype(np.int64) for name in ("width", "height"))
        large_enough = np.minimum(width, height) >= max(self.options.min_size, 1)
        small_enough = width * height <= self.options.max_pixels
        return captioned.to_numpy(zero_copy_only=False) & large_enough & small_enough

    @cached_property
    def usable_rows(self) -> Bool[np.ndarray, " rows"]:
        """`usable` of the whole index."""
        return np.concatenate([np.zeros(0, bool), *map(self.usable, self.index.batches)])

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "usable_rows"}


def open_index(source: IndexedSource, folder: Path | None = None) -> Index:
    """The index of a data set; where none is up to date, one process builds it, others wait.

    ValueError where it cannot be written, or nobody can train on the data.
    """
    folders = places(folder, source.place)
    for place in folders:
        index, _ = _open_current(index_file(source, place), source)
        if index is not None:
            return index
    what = f"the index of {source.title}"
    return in_first_writable(folders, what, lambda place: _build(index_file(source, place), source))


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


def index_file(source: IndexedSource, folder: Path) -> Path:
    """File of the index in a folder, which may hold those of many data sets."""
    named = source.identity
    if folder != source.place / HIDDEN:  # beside the data, they may be moved as a whole
        named = f"{source.place.resolve()}\n{named}"
    digest = hashlib.blake2b(named.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return folder / f"{source.name}-{digest}.arrow"


def _open_current(file: Path, source: IndexedSource) -> tuple[Index | None, str]:
    """The index if it is up to date, else None and why not ("" where there is no file)."""
    try:
        index = Index(file)
    except FileNotFoundError:
        return None, ""
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        return None, f"it is damaged ({error})"
    before, now = index.facts, _facts(source)
    if list(before.items()) == list(now.items()):
        return index, ""
    changed = (name for name in {**now, **before} if before.get(name) != now.get(name))
    return None, f"{next(changed, 'the order of its files')} has changed"


def _facts(source: IndexedSource) -> dict[str, str]:
    return {
        "what formats can be read": " ".join(formats()),
        "what is left out": json.dumps(source.left_out),
        **source.facts(),
    }


def _build(file: Path, source: IndexedSource) -> Index:
    """Build under the lock, unless another process has done so while this one waited for it."""
    with locked(file.with_suffix(".lock"), source.title):
        index, change = _open_current(file, source)
        if index is not None:
            return index
        if change:
            logger.info("The index of %s is built anew: %s", source.title, change)
        start = time.monotonic()
        # A bar on a terminal, a line a minute in a log.
        pause, delay = (0.1, 2.0) if sys.stderr.isatty() else (60.0, 60.0)
        title = f"indexing {source.title}"
        # Facts come before rows: a change in between is noticed by whoever opens the index next.
        facts = _facts(source)
        with (
            replacing(file) as unfinished,
            IndexWriter(unfinished, facts) as writer,
            tqdm(desc=title, unit=" items", mininterval=pause, delay=delay) as bar,
        ):
            for text, names in source.left_out.items():
                writer.note(text, *names)
            source.build(writer, bar)
        took = time.monotonic() - start
        indexed = "Indexed %s: %d items in %.1f s, kept in %s"
        logger.info(indexed, source.title, writer.rows, took, file)
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
