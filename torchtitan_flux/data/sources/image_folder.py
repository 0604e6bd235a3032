"""Pictures in folders, with captions in text files beside them or in metadata files."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from torchtitan_flux.data.decode import header_size
from torchtitan_flux.data.sources.captions import (
    METADATA_FILES,
    NO_CAPTION,
    Captions,
    Uncaptioned,
    captions_of,
    captions_of_file,
    lines_of,
    metadata_captions,
)
from torchtitan_flux.data.sources.index import IndexWriter, Row
from torchtitan_flux.data.sources.index_cache import open_index
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.listing import (
    NOT_UTF8,
    Directory,
    missing,
    not_regular,
    stamp,
    walk,
)
from torchtitan_flux.data.sources.pairing import Pairs, composed, is_picture
from torchtitan_flux.data.sources.parts import NO_PART, own_part, part_of_folder
from torchtitan_flux.data.sources.source import CAPTIONS, SourceOptions, Split, UnreadableItem
from torchtitan_flux.formatting import listed

WATCHED_FILES = 200_000
"""Up to so many files, every one is looked at for changes; above, directories and metadata."""

SHARED = "pictures share their text with another picture of the same name"
SECOND_TEXT = "pictures have a .caption besides their .txt, which alone is read"
SEVERAL_LINES = (
    f'text files of several lines, each taken as one caption ({CAPTIONS} = "lines" makes every '
    "line a caption of its own)"
)
DEEPER_PARTS = (
    "folders named after parts are read like any other, since they do not lie directly below the "
    "data's folder: name the one above them"
)
NOT_REGULAR = "names of pictures and texts that are a pipe, a socket, a device or a folder"
UNCLEAR = "several spellings of its name are there, and whose its text is is not known"

_OTHER_SOURCES = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "parquet"}
_COARSE = "more than 200,000 files"  # stands among the facts where only directories are watched


class FolderSource(IndexedSource):
    """Pictures below a folder, sorted; ids are their paths relative to it.

    A picture's captions are what the metadata files say that name it, in order; without any, what
    the text file of its stem says. Where folders directly below the root are named after parts,
    only those of the split are read.
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
        folders = next(walk(self.place, options.index_folder)).folders
        parts = {name: part_of_folder(name) for name in folders}
        if {"train"} < set(parts.values()) - {""}:
            parts = {name: part for name, part in parts.items() if self._holds_pictures(name)}
        own = own_part(parts, split, self.title, both=True)
        self._part, self.shared, self.left_out = own.part, own.shared, own.left_out
        self._only = set(own.names) if own.part else None
        self.identity = json.dumps([options.caption_column, options.captions_by_line, self._part])
        super().__init__(self.name, self.title, open_index(self, options.index_folder), options)

    def _holds_pictures(self, name: str) -> bool:
        below = itertools.islice(walk(self.place, self.options.index_folder, {name}), 1, None)
        return any(d.error or any(map(is_picture, d.files)) for d in below)

    def _walk(self) -> Iterator[Directory]:
        return walk(self.place, self.options.index_folder, self._only)

    def _is_read(self, path: str) -> bool:
        """Whether a picture belongs to the part that is read."""
        return self._only is None or path.partition("/")[0] in self._only

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
        named = self._metadata(writer)
        bar.total = sum(sum(map(is_picture, directory.files)) for directory in self._walk())
        suffixes = set()
        for directory in self._walk():
            if directory.error:
                writer.refused(self.place / directory.name, directory.error)
            writer.note(NOT_UTF8, *[directory.name or "."] * directory.unnameable)
            if "/" in directory.name and part_of_folder(os.path.basename(directory.name)):
                writer.note(DEEPER_PARTS, directory.name)
            self._add(directory, named, writer, bar)
            suffixes |= {os.path.splitext(file)[1].lower() for file in directory.files}
        for path in sorted(named):  # missing, hidden, or of a suffix of their own
            if self._is_read(path):
                self._add_row(path, self._captions(path, named, None, writer), writer)
            elif "/" not in path:
                writer.note(NO_PART, path)
        if not writer.rows:
            part = f" of the {self._part} part" if self._part else ""
            why = [
                f'its {suffix} files are read by training.dataset = "{kind}"'
                for suffix, kind in _OTHER_SOURCES.items()
                if suffix in suffixes
            ]
            why += [f"{note.text}: {listed(note.examples, 3)}" for note in writer.notes.values()]
            raise ValueError("; ".join([f"{self.place}{part} holds no pictures", *why]))

    def _metadata(self, writer: IndexWriter) -> dict[str, list[Any]]:
        """Path of a picture -> what metadata files say of it.

        Where they name it in another of Unicode's spellings, and one file alone can be meant, that
        is the picture.
        """
        found: dict[str, list[Any]] = {}
        for path in (path for directory in self._walk() for path in directory.paths()):
            if os.path.basename(path) not in METADATA_FILES:
                continue
            if os.path.exists(self.place / path) and not_regular(self.place / path):
                writer.note(NOT_REGULAR, path)
                continue
            try:
                for name, value in metadata_captions(self.place, path, self.options.caption_column):
                    values = value if isinstance(value, list) else [value]
                    found.setdefault(name, []).extend(values)
            except Uncaptioned as error:
                if self.options.caption_column:
                    raise
                writer.note("metadata files without captions", str(error))
        spelled = {path: composed(path) for path in found if not path.isascii()}
        there: dict[str, set[str]] = {spelling: set() for spelling in spelled.values()}
        for directory in self._walk() if spelled else ():
            for path in directory.paths():
                there.get(composed(path), set()).add(path)
        for path, spelling in spelled.items():
            spellings = there[spelling]
            if len(spellings) == 1 and path not in spellings:
                found.setdefault(*spellings, []).extend(found.pop(path))  # pyright: ignore
        return found

    def _add(
        self, directory: Directory, named: dict[str, list[Any]], writer: IndexWriter, bar: tqdm
    ) -> None:
        """Rows of one directory."""
        pairs = Pairs(directory.files)
        for file in filter(is_picture, directory.files):
            bar.update()
            path = os.path.join(directory.name, file)
            if self._is_read(path):
                self._add_row(path, self._captions(path, named, pairs, writer), writer)
            else:
                named.pop(path, None)
                writer.note(NO_PART, path)
        for text, file in pairs.remarks():
            if (path := os.path.join(directory.name, file)) not in named:
                writer.note(text, path)

    def _captions(
        self, path: str, named: dict[str, list[Any]], pairs: Pairs | None, writer: IndexWriter
    ) -> Captions:
        """What metadata files say of a picture, else what the first of its texts does that speaks.

        Where the operating system refuses a text, there is neither a caption nor a reason.
        """
        captions, reason = captions_of(named.pop(path, None), self.options.captions_by_line)
        if captions or pairs is None:
            return captions, reason
        folder, file = os.path.split(path)
        texts = pairs.texts(file)
        for text in texts:
            captions, why = self._text(os.path.join(folder, text), writer)
            reason = why if reason == NO_CAPTION else reason
            if captions:
                if pairs.shares_text(file):
                    writer.note(SHARED, path)
                if text != texts[-1]:
                    writer.note(SECOND_TEXT, path)
                return captions, ""
        return (), UNCLEAR if pairs.is_unclear(file) else reason

    def _text(self, path: str, writer: IndexWriter) -> Captions:
        file, suffix = self.place / path, os.path.splitext(path)[1].lower()
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
        found = captions_of_file(data, suffix, "", self.options.captions_by_line)
        if not self.options.captions_by_line and len(lines_of("".join(found[0]))) > 1:
            writer.note(SEVERAL_LINES, path)
        return found

    def _add_row(self, path: str, captions: Captions, writer: IndexWriter) -> None:
        texts, reason = captions
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
        writer.add(Row(path, 0, 0, length, width, height, texts, reason))

    def read(self, row: Row) -> bytes:
        path = self.place / row.item_id
        try:
            if what := not_regular(path):
                raise UnreadableItem(row.item_id, f"is {what}, not a file")
            return path.read_bytes()
        except FileNotFoundError as error:
            raise UnreadableItem(row.item_id, missing(path)) from error
