"""Pictures in folders, with captions in .txt files beside them or in metadata files."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from torchtitan_flux.data.captions import (
    METADATA_FILES,
    Captions,
    captions_of_text,
    captions_or_reason,
    metadata_captions,
)
from torchtitan_flux.data.files import PATH_KEY, Directory, given_path, header_size, walk
from torchtitan_flux.data.index import IndexWriter, Row
from torchtitan_flux.data.index_cache import open_index
from torchtitan_flux.data.indexed import IndexedSource
from torchtitan_flux.data.sources import SourceOptions, Split

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

WATCHED_FILES = 200_000
"""Up to so many files, every one is looked at for changes; above, directories and metadata."""

logger = logging.getLogger(__name__)


class FolderSource(IndexedSource):
    """All pictures below a folder, sorted; ids are their paths relative to it.

    A picture's captions are what the metadata files say that name it, in order; without any, the
    lines of the .txt file of its stem.

    Args:
        split: whose path key messages name.
        options: path, index_folder, what they say of captions and of pictures.

    Raises:
        ValueError: there is no folder, no picture in it, or a metadata file cannot be understood.
    """

    def __init__(self, split: Split, options: SourceOptions):
        given = given_path(options.path, split, "the folder that holds the pictures")
        self.root = Path(given).absolute()
        if not self.root.is_dir():
            what = "is not a folder" if self.root.exists() else "does not exist"
            if given.endswith(".tar"):
                what += '; training.dataset = "webdataset" reads tar files'
            raise ValueError(f"{PATH_KEY[split]}: {given} {what}")
        recipe = _Pictures(self.root, options, split)
        super().__init__(
            "folder", str(self.root), open_index(recipe, options.index_folder), options
        )

    def read(self, row: Row) -> bytes:
        return (self.root / row.item_id).read_bytes()


class _Pictures:
    """The recipe of a folder's index (`index_cache.Recipe`)."""

    kind = "folder"

    def __init__(self, root: Path, options: SourceOptions, split: Split):
        self.place = root
        self.title = str(root)
        self.identity = options.caption_column
        self._column = options.caption_column
        self._index_folder = options.index_folder
        self._split: Split = split

    def _walk(self) -> Iterator[Directory]:
        return walk(self.place, self._index_folder)

    def facts(self) -> dict[str, str]:
        marks, coarse, count = {}, {}, 0
        for directory in self._walk():
            coarse[directory.name] = self._coarse_mark(directory.name)
            count += len(directory.files)
            if count <= WATCHED_FILES:
                marks[directory.name] = self._fine_mark(directory)
        fine = count <= WATCHED_FILES
        return {
            "watched": "files" if fine else "directories",
            "directories": json.dumps(marks if fine else coarse),
        }

    def change(self, stored: dict[str, str]) -> str:
        before: dict[str, str] = json.loads(stored["directories"])
        if stored["watched"] == "files":
            now = {directory.name: self._fine_mark(directory) for directory in self._walk()}
        else:
            # Without new or lost entries in a known directory there are no other directories.
            now = {name: self._coarse_mark(name) for name in before}
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                return f"{self.place / name} has changed"
        return ""

    def _fine_mark(self, directory: Directory) -> str:
        """Names, sizes and times of all files of a directory, digested."""
        digest = hashlib.blake2b(digest_size=8)
        for path in directory.paths():
            digest.update(f"{path}\0{_stamp(self.place / path)}\n".encode())
        return digest.hexdigest()

    def _coarse_mark(self, name: str) -> str:
        """Time of the last change to a directory's list of files; stamps of its metadata."""
        folder = self.place / name
        return " ".join(map(_stamp, (folder, *(folder / file for file in METADATA_FILES))))

    def build(self, writer: IndexWriter, bar: tqdm) -> None:
        named, pictures, unnameable = self._metadata()
        bar.total = pictures
        for directory in self._walk():
            files = set(directory.files)
            for file, path in zip(directory.files, directory.paths(), strict=True):
                if not file.lower().endswith(SUFFIXES):
                    continue
                text = os.path.splitext(file)[0] + ".txt"
                if path in named:
                    captions = captions_or_reason(named.pop(path))
                elif text in files:
                    captions = self._text(self.place / directory.name / text)
                else:
                    captions = (), "has no caption"
                writer.add(self._row(path, captions))
                bar.update()
        for path in sorted(named):  # missing, hidden, or of a suffix of their own
            writer.add(self._row(path, captions_or_reason(named[path])))
        if not writer.rows:
            raise ValueError(
                f"{PATH_KEY[self._split]}: {self.place} holds no pictures "
                f"({', '.join(suffix[1:] for suffix in SUFFIXES)})"
            )
        if unnameable:
            logger.warning(
                "%s: %d files whose names are not UTF-8 are left out", self.place, unnameable
            )

    def _metadata(self) -> tuple[dict[str, list[Any]], int, int]:
        """What metadata files say of each picture they name; how many pictures there are; and how
        many files have names that are not text."""
        named: dict[str, list[Any]] = {}
        pictures = unnameable = 0
        for directory in self._walk():
            unnameable += directory.unnameable
            for file, path in zip(directory.files, directory.paths(), strict=True):
                pictures += file.lower().endswith(SUFFIXES)
                if file not in METADATA_FILES:
                    continue
                for picture, value in metadata_captions(self.place, path, self._column):
                    values = value if isinstance(value, list) else [value]
                    named.setdefault(picture, []).extend(values)
        return named, pictures, unnameable

    def _text(self, path: Path) -> Captions:
        try:
            return captions_of_text(path.read_bytes())
        except OSError as error:
            return (), f"its .txt: {error.strerror}"

    def _row(self, path: str, captions: Captions) -> Row:
        texts, reason = captions
        width = height = length = 0
        try:
            with (self.place / path).open("rb") as file:
                length = os.fstat(file.fileno()).st_size
                width, height = header_size(file)
        except FileNotFoundError:
            reason = "does not exist"
        except OSError as error:
            reason = str(error.strerror)
        return Row(path, 0, 0, length, width, height, texts, reason)


def _stamp(path: Path) -> str:
    """Size and time of the last change of a file, "" where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_size}:{found.st_mtime_ns}"
