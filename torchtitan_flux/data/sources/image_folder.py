"""Pictures in folders, with captions in text files beside them or in metadata files."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from torchtitan_flux.data.decode import header_size
from torchtitan_flux.data.sources import captions as texts
from torchtitan_flux.data.sources import listing
from torchtitan_flux.data.sources.captions import METADATA_FILES, NO_CAPTION, Captions
from torchtitan_flux.data.sources.index import IndexWriter, Row
from torchtitan_flux.data.sources.index_cache import open_index
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.listing import missing, not_regular, stamp
from torchtitan_flux.data.sources.pairing import Pairs, is_picture, stem_and_suffix
from torchtitan_flux.data.sources.source import CAPTIONS, SourceOptions, Split, UnreadableItem
from torchtitan_flux.data.sources.split import NO_PART, part_of_folder, split_files
from torchtitan_flux.formatting import listed

WATCHED_FILES = 200_000
"""Up to so many files, every one is looked at for changes; above, directories and metadata."""

SHARED = "pictures share their text with another picture of the same name"
SEVERAL_LINES = f'text files of several lines, one caption each unless {CAPTIONS} = "lines"'
DEEPER_PARTS = "folders named after parts do not lie directly below the data's folder: all are read"
NOT_REGULAR = "names of pictures and texts that are a pipe, a socket, a device or a folder"

_OTHER_SOURCES = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "parquet"}
_COARSE = "more than 200,000 files"  # stands among the facts where only directories are watched


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
            what = "is not a folder" if self.place.exists() else missing(self.place)
            hint = '; training.dataset = "webdataset" reads tar files'
            raise ValueError(f"{self.place} {what}{hint if self.place.suffix == '.tar' else ''}")
        folders = next(listing.walk(self.place, options.index_folder)).folders
        parts = {name: part_of_folder(name) for name in folders}
        own = split_files(parts, split, self.title, both=True)
        self._part, self.shared, self.left_out = own.part, own.shared, own.left_out
        self._only = set(own.names) if own.part else None
        self.identity = json.dumps([options.caption_column, options.captions_by_line, self._part])
        super().__init__(self.name, self.title, open_index(self, options.index_folder), options)

    def _walk(self) -> Iterator[listing.Directory]:
        return listing.walk(self.place, self.options.index_folder, self._only)

    def facts(self, stored: Mapping[str, str]) -> dict[str, str]:
        if _COARSE in stored:
            # Without new or lost entries in a known directory there are no other directories.
            names = [name for name in stored if name.startswith(".")]
            return {name: self._coarse_mark(name) for name in names} | {_COARSE: ""}
        fine, coarse, count = {}, {}, 0
        for directory in self._walk():
            name = os.path.join(".", directory.name)
            coarse[name] = self._coarse_mark(name)
            count += len(directory.files)
            if count <= WATCHED_FILES or stored:
                marks = (f"{path}\0{stamp(self.place / path)}" for path in directory.paths())
                fine[name] = hashlib.blake2b("\n".join(marks).encode(), digest_size=8).hexdigest()
        return fine if count <= WATCHED_FILES or stored else coarse | {_COARSE: ""}

    def _coarse_mark(self, name: str) -> str:
        """Time of the last change to a directory's list of files; stamps of its metadata."""
        folder = self.place / name
        return " ".join(map(stamp, (folder, *(folder / file for file in METADATA_FILES))))

    def build(self, writer: IndexWriter, bar: tqdm) -> None:
        captioned = self._metadata(writer)
        bar.total = sum(sum(map(is_picture, directory.files)) for directory in self._walk())
        for directory in self._walk():
            if directory.error:
                writer.refused(self.place / directory.name, directory.error)
            writer.note(listing.NOT_UTF8, *[directory.name or "."] * directory.undecodable)
            if "/" in directory.name and part_of_folder(os.path.basename(directory.name)):
                writer.note(DEEPER_PARTS, directory.name)
            pairs = Pairs(directory.files)
            for path in filter(is_picture, directory.paths()):
                bar.update()
                self._add(path, captioned.pop(path, None), pairs, writer)
            for text, file in pairs.unread():
                if (path := os.path.join(directory.name, file)) not in captioned:
                    writer.note(text, path)
        for path in sorted(captioned):  # missing, hidden, or of a suffix of their own
            self._add(path, captioned[path], None, writer)
        if not writer.rows:
            part = f" of the {self._part} part" if self._part else ""
            files = (file for directory in self._walk() for file in directory.files)
            suffixes = {stem_and_suffix(file)[1] for file in files}
            why = [
                f'its {suffix} files are read by training.dataset = "{kind}"'
                for suffix, kind in _OTHER_SOURCES.items()
                if suffix in suffixes
            ]
            why += [f"{note.text}: {listed(note.examples, 3)}" for note in writer.notes.values()]
            raise ValueError("; ".join([f"{self.place}{part} holds no pictures", *why]))

    def _metadata(self, writer: IndexWriter) -> dict[str, list[Any]]:
        """Path of a picture -> what metadata files say of it."""
        found: dict[str, list[Any]] = {}
        column = self.options.caption_column
        for path in (path for directory in self._walk() for path in directory.paths()):
            if os.path.basename(path) not in METADATA_FILES:
                continue
            if os.path.exists(self.place / path) and not_regular(self.place / path):
                writer.note(NOT_REGULAR, path)
                continue
            try:
                for name, value in texts.metadata_captions(self.place, path, column):
                    values = value if isinstance(value, list) else [value]
                    found.setdefault(name, []).extend(values)
            except texts.Uncaptioned as error:
                if column:
                    raise
                writer.note("metadata files without captions", str(error))
        return found

    def _captions(
        self, path: str, stated: object, pairs: Pairs | None, writer: IndexWriter
    ) -> Captions:
        """What metadata say of a picture, else the first of its texts that says anything."""
        captions, reason = texts.captions_of(stated, self.options.captions_by_line)
        folder, file = os.path.split(path)
        if captions or pairs is None:
            return captions, reason
        for text in pairs.texts(file):
            captions, why = self._text(os.path.join(folder, text), writer)
            reason = why if reason == NO_CAPTION else reason
            if captions:
                if pairs.shares_text(file):
                    writer.note(SHARED, path)
                return captions, ""
        return (), reason

    def _text(self, path: str, writer: IndexWriter) -> Captions:
        """Where the operating system refuses a text, there is neither a caption nor a reason."""
        file, suffix = self.place / path, stem_and_suffix(path)[1]
        try:
            if not_regular(file):
                writer.note(NOT_REGULAR, path)
                return (), NO_CAPTION
            data = file.read_bytes()
        except FileNotFoundError:
            return (), f"its {suffix} {missing(file)}"
        except OSError as error:
            writer.refused(file, error)
            return (), ""
        found = texts.captions_of_file(data, suffix, "", self.options.captions_by_line)
        if not self.options.captions_by_line and len(texts.lines_of("".join(found[0]))) > 1:
            writer.note(SEVERAL_LINES, path)
        return found

    def _add(self, path: str, stated: object, pairs: Pairs | None, writer: IndexWriter) -> None:
        """The row of a picture of which metadata files state these captions."""
        top, below, _ = path.partition("/")
        if self._only is not None and top not in self._only:
            if not below:
                writer.note(NO_PART, path)
            return
        captions, reason = self._captions(path, stated, pairs, writer)
        width = height = length = 0
        try:
            if not_regular(self.place / path):
                writer.note(NOT_REGULAR, path)
                return
            with (self.place / path).open("rb") as file:
                length = os.fstat(file.fileno()).st_size
                width, height, wrong = header_size(file)
                reason = wrong or reason
        except (FileNotFoundError, NotADirectoryError):
            reason = missing(self.place / path)
        except OSError:
            pass  # may be over tomorrow: it is tried again when it is read
        writer.add(Row(path, 0, 0, length, width, height, captions, reason))

    def read(self, row: Row) -> bytes:
        path = self.place / row.item_id
        try:
            if what := not_regular(path):
                raise UnreadableItem(row.item_id, f"is {what}, not a file")
            return path.read_bytes()
        except FileNotFoundError as error:
            raise UnreadableItem(row.item_id, missing(path)) from error
