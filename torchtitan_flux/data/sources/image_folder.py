"""Pictures in folders, with captions in text files beside them or in metadata files."""

import hashlib
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
from torchtitan_flux.data.sources.parts import (
    NO_PART,
    are_parts,
    not_read,
    own_parts,
    part_of_folder,
)
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

    Raises:
        OSError, ValueError: there is no folder, no picture in it, or a metadata file cannot be
            understood.
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
        if are_parts(parts.values()):
            parts = {name: part for name, part in parts.items() if self._holds_pictures(name)}
        own = own_parts(parts.values(), split, self.title) if are_parts(parts.values()) else None
        self._part, self.shared = own[0] if own else "", own is None
        self._only = {name for name in parts if parts[name] == self._part} if own else None
        self.left_out = not_read(parts, own)
        self.identity = json.dumps([options.caption_column, options.captions_by_line, self._part])
        super().__init__(self.name, self.title, open_index(self, options.index_folder), options)

    def _holds_pictures(self, name: str) -> bool:
        _, *below = walk(self.place, self.options.index_folder, {name})
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
        metadata = _Metadata(self.place, self.options.caption_column)
        bar.total = 0
        for directory in self._walk():
            metadata.read(directory, writer)
            bar.total += sum(map(is_picture, directory.files))
        metadata.join_spellings(self._walk())
        suffixes = set()
        for directory in self._walk():
            if directory.error:
                writer.refused(self.place / directory.name, directory.error)
            writer.note(NOT_UTF8, *[directory.name or "."] * directory.unnameable)
            if "/" in directory.name and part_of_folder(os.path.basename(directory.name)):
                writer.note(DEEPER_PARTS, directory.name)
            self._add(directory, metadata, writer, bar)
            suffixes |= {os.path.splitext(file)[1].lower() for file in directory.files}
        for path in sorted(metadata.captions):  # missing, hidden, or of a suffix of their own
            if self._is_read(path):
                self._add_row(path, self._captions(path, metadata, None, writer), writer)
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

    def _add(
        self, directory: Directory, metadata: "_Metadata", writer: IndexWriter, bar: tqdm
    ) -> None:
        """Rows of one directory."""
        pairs = Pairs(directory.files)
        within = f"{directory.name}/" if directory.name else ""
        for file in filter(is_picture, directory.files):
            bar.update()
            if self._is_read(path := within + file):
                self._add_row(path, self._captions(path, metadata, pairs, writer), writer)
            else:
                metadata.captions.pop(path, None)
                writer.note(NO_PART, path)
        for text, file in pairs.remarks():
            if within + file not in metadata.captions:
                writer.note(text, within + file)

    def _captions(
        self, path: str, metadata: "_Metadata", pairs: Pairs | None, writer: IndexWriter
    ) -> Captions:
        """What metadata files say of a picture, else what the first of its texts does that speaks.

        Where the operating system refuses a text, there is neither a caption nor a reason.
        """
        by_line = self.options.captions_by_line
        captions, reason = captions_of(metadata.captions.pop(path, None), by_line)
        if captions or pairs is None:
            return captions, reason
        folder, _, file = path.rpartition("/")
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
        if pairs.is_unclear(file):
            return (), UNCLEAR
        complaint = metadata.complaints.get(path)
        if complaint and self.options.default_caption is None:
            raise complaint
        return (), reason

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


class _Metadata:
    """What metadata files say.

    Attributes:
        captions: path of a picture -> what stands for its captions.
        complaints: pictures whose metadata file has no captions at all -> what to say if they
            have none elsewhere.
    """

    def __init__(self, root: Path, column: str):
        self.captions: dict[str, list[Any]] = {}
        self.complaints: dict[str, Uncaptioned] = {}
        self._root = root
        self._column = column

    def read(self, directory: Directory, writer: IndexWriter) -> None:
        """Read the metadata files of a directory."""
        for path in directory.paths():
            if os.path.basename(path) not in METADATA_FILES:
                continue
            if os.path.exists(self._root / path) and not_regular(self._root / path):
                writer.note("metadata files that are a pipe, a socket or a device", path)
                continue
            pictures = []
            try:
                for picture, value in metadata_captions(self._root, path, self._column):
                    values = value if isinstance(value, list) else [value]
                    self.captions.setdefault(picture, []).extend(values)
                    pictures.append(picture)
            except Uncaptioned as complaint:
                if self._column:
                    raise
                self.complaints |= dict.fromkeys(pictures, complaint)

    def join_spellings(self, directories: Iterator[Directory]) -> None:
        """Give captions to the pictures whose names are spelled otherwise in Unicode.

        Where several pictures differ in nothing else, none of them is taken.
        """
        named = {path: composed(path) for path in self.captions if not path.isascii()}
        there: dict[str, set[str]] = {spelling: set() for spelling in named.values()}
        for directory in directories if named else ():
            for path in directory.paths():
                there.get(composed(path), set()).add(path)
        for path, spelling in named.items():
            spellings = there[spelling]
            if len(spellings) == 1 and path not in spellings:
                self.captions.setdefault(spellings.pop(), []).extend(self.captions.pop(path))
