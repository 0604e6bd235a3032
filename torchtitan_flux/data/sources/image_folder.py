"""Pictures in folders, with captions in text files beside them or in metadata files."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from torchtitan_flux.data.decode import header_size
from torchtitan_flux.data.formats import is_picture
from torchtitan_flux.data.sources import captions as texts
from torchtitan_flux.data.sources import listing
from torchtitan_flux.data.sources.index import IndexWriter, Row
from torchtitan_flux.data.sources.indexed import IndexedSource, open_index
from torchtitan_flux.data.sources.source import CAPTIONS, SourceOptions, Split
from torchtitan_flux.data.sources.split import NO_PART, part_of, split_files

TEXT_SUFFIXES = (".txt", ".caption")
"""Of texts beside pictures, in any case: the first that says anything counts."""

UNREAD = "files are not read: they are neither pictures nor the text of one"
SEVERAL_LINES = f'text files of several lines, one caption each unless {CAPTIONS} = "lines"'
DEEPER_PARTS = "folders named after parts do not lie directly below the data's folder: all are read"


class FolderSource(IndexedSource):
    """Pictures below a folder, sorted; ids are their paths relative to it.

    Captions come from the metadata files that name a picture, else from the text file of its stem.
    Where folders directly below the root are named after parts, those of the split are read.
    """

    name = "folder"

    def __init__(self, split: Split, options: SourceOptions):
        self.place = Path(str(options.path)).absolute()
        self.title = str(self.place)
        self.options = options
        if not self.place.is_dir():
            what = "is not a folder" if self.place.exists() else listing.missing(self.place)
            raise ValueError(f"{self.place} {what}")
        folders = next(listing.walk(self.place, options.index_folder)).folders
        parts = {name: part_of(name) for name in folders}
        own = split_files(parts, split, self.title, both=True)
        self._part, self.shared, self.left_out = own.part, own.shared, own.left_out
        self._only = set(own.names) if own.part else None
        self.identity = json.dumps([options.caption_column, options.captions_by_line, self._part])
        super().__init__(self.name, self.title, open_index(self, options.index_folder), options)

    def _walk(self) -> Iterator[listing.Directory]:
        return listing.walk(self.place, self.options.index_folder, self._only)

    def facts(self) -> dict[str, str]:
        found = {}
        for directory in self._walk():
            marks = [f"{path}\0{listing.stamp(self.place / path)}" for path in directory.paths()]
            said = "\n".join(marks + directory.left_out).encode("utf-8", "surrogateescape")
            digest = hashlib.blake2b(said, digest_size=8).hexdigest()
            found[os.path.join(".", directory.name)] = digest
        return found

    def build(self, writer: IndexWriter, bar: tqdm) -> None:
        captioned = self._metadata()
        bar.total = sum(sum(map(is_picture, directory.files)) for directory in self._walk())
        for directory in self._walk():
            writer.note(listing.LEFT_OUT, *directory.left_out)
            if "/" in directory.name and part_of(os.path.basename(directory.name)):
                writer.note(DEEPER_PARTS, directory.name)
            beside = _texts_by_stem(directory)
            pictures = set(filter(is_picture, directory.paths()))
            used = {text for path in pictures for text in beside[os.path.splitext(path)[0]]}
            for path in directory.paths():
                if path in pictures:
                    bar.update()
                    own = beside[os.path.splitext(path)[0]]
                    self._add(path, captioned.pop(path, None), own, writer)
                elif not (path in used or path in captioned or _is_metadata(path)):
                    writer.note(UNREAD, path)
        for path in sorted(captioned):  # missing, hidden, or of a suffix of their own
            self._add(path, captioned[path], [], writer)
        if not writer.rows:
            part = f" of the {self._part} part" if self._part else ""
            others = 'training.dataset = "webdataset" reads tar files, "parquet" tables'
            raise ValueError(f"{self.place}{part} holds no pictures; {writer.noted()}; {others}")

    def _metadata(self) -> dict[str, list[Any]]:
        """Path of a picture -> what metadata files say of it."""
        found: dict[str, list[Any]] = {}
        column = self.options.caption_column
        for path in (path for directory in self._walk() for path in directory.paths()):
            if _is_metadata(path):
                for name, value in texts.metadata_captions(self.place, path, column):
                    values = value if isinstance(value, list) else [value]
                    found.setdefault(name, []).extend(values)
        return found

    def _text(self, path: str, writer: IndexWriter) -> texts.Captions:
        file, suffix = self.place / path, os.path.splitext(path)[1].lower()
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            return (), f"its {suffix} {listing.missing(file)}"
        found = texts.captions_of_file(data, suffix, "", self.options.captions_by_line)
        if not self.options.captions_by_line and "\n" in "".join(found[0]):
            writer.note(SEVERAL_LINES, path)
        return found

    def _add(self, path: str, stated: object, beside: list[str], writer: IndexWriter) -> None:
        """The row of a picture of which metadata files state these captions."""
        top, below, _ = path.partition("/")
        if self._only is not None and top not in self._only:
            if not below:
                writer.note(NO_PART, path)
            return
        said = [texts.captions_of(stated, self.options.captions_by_line)]
        captions, reason = texts.first_of(chain(said, (self._text(t, writer) for t in beside)))
        width = height = length = 0
        file, wrong = self.place / path, ""
        try:
            if file.is_file():
                with file.open("rb") as opened:
                    length = os.fstat(opened.fileno()).st_size
                    width, height, wrong = header_size(opened)
            else:
                wrong = listing.missing(file)
        except OSError:
            pass  # may be over tomorrow: it is tried again when it is read
        writer.add(Row(path, 0, 0, length, width, height, captions, wrong or reason))

    def read(self, row: Row) -> bytes:
        return (self.place / row.item_id).read_bytes()


def _is_metadata(path: str) -> bool:
    return os.path.basename(path) in texts.METADATA_FILES


def _texts_by_stem(directory: listing.Directory) -> defaultdict[str, list[str]]:
    """Path without its suffix -> texts that belong to it, in the order of TEXT_SUFFIXES."""
    found = defaultdict(list)
    for wanted in TEXT_SUFFIXES:
        for path in reversed(directory.paths()):  # a.txt before a.TXT
            stem, suffix = os.path.splitext(path)
            if suffix.lower() == wanted:
                found[stem].append(path)
    return found
