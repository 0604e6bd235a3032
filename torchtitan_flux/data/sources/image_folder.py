"""Pictures in folders, with captions in text files beside them or in metadata files."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from torchtitan_flux.data.decode import header_size
from torchtitan_flux.data.formats import formats, named
from torchtitan_flux.data.sources.captions import (
    METADATA_FILES,
    NO_CAPTION,
    Captions,
    Uncaptioned,
    captions_of_text,
    captions_or_reason,
    lines_of,
    metadata_captions,
)
from torchtitan_flux.data.sources.foreign import no_plain_file
from torchtitan_flux.data.sources.index import IndexWriter, Row
from torchtitan_flux.data.sources.index_cache import open_index
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.listing import (
    PATH_KEY,
    Directory,
    directories_of,
    given_path,
    missing,
    walk,
)
from torchtitan_flux.data.sources.pairing import (
    SHARED,
    UNCLEAR_REASON,
    Pairs,
    composed,
    is_picture,
)
from torchtitan_flux.data.sources.parts import (
    NO_PART,
    are_parts,
    deeper_parts,
    not_read,
    own_parts,
    part_of_folder,
)
from torchtitan_flux.data.sources.source import Source, SourceOptions, Split, UnreadableItem
from torchtitan_flux.data.sources.split import part_or_share

WATCHED_FILES = 200_000
"""Up to so many files, every one is looked at for changes; above, directories and metadata."""

_SEVERAL_LINES = (
    "text files of several lines, each taken as one caption "
    '(data.captions = "lines" makes every line a caption of its own)'
)
_SECOND_TEXT = "pictures have a .caption besides their .txt, which alone is read"
_DEEPER_PARTS = (
    "folders named after parts are read like any other, since they do not lie directly below the "
    "data's folder: name the one above them"
)
_NO_FILES = "names of pictures and texts that are a pipe, a socket, a device or a folder"


def folder_source(split: Split, options: SourceOptions) -> Source:
    """One split of a folder: its own folders, where they are named after parts, or a share."""
    source = FolderSource(split, options)
    return part_or_share(source, source.shared, split, options)


class FolderSource(IndexedSource):
    """Pictures below a folder, sorted; ids are their paths relative to it.

    A picture's captions are what the metadata files say that name it, in order; without any, what
    the text file of its stem says. Where folders directly below the root are named after parts,
    only those of the split are read.

    Args:
        split: which part is read, and whose path key messages name.
        options: path, index_folder, what they say of captions and of pictures.

    Attributes:
        shared: no folder was named for a split, so both splits see all pictures.

    Raises:
        ValueError: there is no folder, no picture in it, or a metadata file cannot be understood.
    """

    def __init__(self, split: Split, options: SourceOptions):
        given = given_path(options.path, split, "the folder that holds the pictures")
        self.root = Path(given).absolute()
        try:
            if not self.root.is_dir():
                what = "is not a folder" if self.root.exists() else missing(self.root)
                if given.endswith(".tar"):
                    what += '; training.dataset = "webdataset" reads tar files'
                raise ValueError(f"{PATH_KEY[split]}: {given} {what}")
            recipe = _Pictures(self.root, options, split)
        except OSError as error:
            raise ValueError(
                f"{PATH_KEY[split]}: {given} cannot be opened: {error.strerror}"
            ) from error
        self.shared = recipe.part == ""
        index = open_index(recipe, options.index_folder)
        super().__init__("folder", str(self.root), index, options)

    def read(self, row: Row) -> bytes:
        path = self.root / row.item_id
        try:
            if what := no_plain_file(path):
                raise UnreadableItem(row.item_id, f"is {what}, not a file")
            return path.read_bytes()
        except FileNotFoundError as error:
            raise UnreadableItem(row.item_id, missing(path)) from error


class _Pictures:
    """The recipe of a folder's index (`index_cache.Recipe`).

    Attributes:
        part: of the data, which is read; "" for all of them.
    """

    kind = "folder"

    def __init__(self, root: Path, options: SourceOptions, split: Split):
        self.place = root
        self.title = str(root)
        self._column = options.caption_column
        self._by_line = options.captions_by_line
        self._has_default = options.default_caption is not None
        self._index_folder = options.index_folder
        self._split: Split = split
        parts = self._parts()
        own = own_parts(parts.values(), split, str(root)) if are_parts(parts.values()) else None
        self.part = own[0] if own else ""
        self._only = {name for name in parts if parts[name] == self.part} if own else None
        self._left_out = not_read(parts, own)
        options_of_rows = [options.caption_column, options.captions_by_line]
        self.identity = json.dumps([*options_of_rows, *([self.part] if self.part else [])])

    def _parts(self) -> dict[str, str]:
        """Folders directly below the root that hold pictures -> the part of the data they are."""
        named = directories_of(self.place, self._index_folder)
        parts = {name: part_of_folder(name) for name in named}
        if not are_parts(parts.values()):
            return {}
        return {name: part for name, part in parts.items() if self._holds_pictures(name)}

    def _holds_pictures(self, name: str) -> bool:
        directories = walk(self.place, self._index_folder, {name}, strict=False)
        next(directories)  # the root
        return any(d.error or any(map(is_picture, d.files)) for d in directories)

    def _walk(self) -> Iterator[Directory]:
        return walk(self.place, self._index_folder, self._only, strict=False)

    def _is_read(self, path: str) -> bool:
        """Whether a picture belongs to the part that is read."""
        return self._only is None or path.partition("/")[0] in self._only

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
            "formats": " ".join(formats()),
        }

    def change(self, stored: dict[str, str]) -> str:
        if stored["formats"] != " ".join(formats()):
            return "other formats can be read"
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
        metadata = _Metadata(self.place, self._column)
        pictures = 0
        for directory in self._walk():
            metadata.read(directory, writer)
            pictures += sum(map(is_picture, directory.files))
        metadata.join_spellings(self._walk)
        bar.total = pictures
        for text, names in self._left_out.items():
            for name in names:
                writer.note(text, name)
        refused: list[str] = []
        for directory in self._walk():
            if directory.error:
                refused.append(f"{directory.name}: {directory.error.strerror}")
                writer.unopened(self.place / directory.name, directory.error)
            if directory.unnameable:
                text = "files whose names are not UTF-8 are left out"
                writer.note(text, directory.name or ".", directory.unnameable)
            self._add(directory, metadata, writer, bar)
        pictured = (d.name for d in self._walk() if any(map(is_picture, d.files)))
        for name in deeper_parts(pictured):
            writer.note(_DEEPER_PARTS, name)
        for path in sorted(metadata.captions):  # missing, hidden, or of a suffix of their own
            if self._is_read(path):
                self._add_row(path, self._captions(path, metadata, None, writer), writer)
            elif "/" not in path:
                writer.note(NO_PART, path)
        if not writer.rows:
            nothing = f"holds no pictures ({named()})"
            if others := self._other_sources():
                nothing += f"; {others}"
            if refused:
                nothing += f"; cannot be opened: {', '.join(refused[:3])}"
            part = f" of the {self.part} part" if self.part else ""
            raise ValueError(f"{PATH_KEY[self._split]}: {self.place}{part} {nothing}")

    def _other_sources(self) -> str:
        """What else the folder holds that another source reads, in words; "" for nothing."""
        files = [file.lower() for directory in self._walk() for file in directory.files]
        found = []
        for kind, suffixes in (("webdataset", (".tar",)), ("parquet", (".parquet", ".arrow"))):
            if there := next((s for s in suffixes for file in files if file.endswith(s)), ""):
                found.append(f'its {there} files are read by training.dataset = "{kind}"')
        return ", ".join(found)

    def _add(
        self, directory: Directory, metadata: "_Metadata", writer: IndexWriter, bar: tqdm
    ) -> None:
        """Rows of one directory."""
        pairs = Pairs(directory.files)
        within = f"{directory.name}/" if directory.name else ""
        for file in filter(is_picture, directory.files):
            path = within + file
            bar.update()
            if self._is_read(path):
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
        captions, reason = captions_or_reason(metadata.captions.pop(path, None), self._by_line)
        folder, _, file = path.rpartition("/")
        if pairs and not captions:
            texts = pairs.texts(file)
            for number, text in enumerate(texts, 1):
                captions, why = self._text(self.place / folder / text, writer)
                reason = why if reason == NO_CAPTION else reason
                if captions:
                    if pairs.shares_text(file):
                        writer.note(SHARED, path)
                    if number < len(texts):
                        writer.note(_SECOND_TEXT, path)
                    return captions, ""
        if not captions and pairs and pairs.is_unclear(file):
            return (), UNCLEAR_REASON
        if not (captions or self._has_default) and (complaint := metadata.complaints.get(path)):
            raise complaint
        return captions, reason

    def _text(self, path: Path, writer: IndexWriter) -> Captions:
        try:
            if no_plain_file(path):
                writer.note(_NO_FILES, str(path.relative_to(self.place)))
                return (), NO_CAPTION
            data = path.read_bytes()
        except FileNotFoundError:
            return (), f"its {path.suffix.lower()} {missing(path)}"
        except OSError as error:
            writer.unopened(path, error)
            return (), ""
        found = captions_of_text(data, self._by_line, path.suffix.lower())
        if not self._by_line and found[0] and len(lines_of(found[0][0])) > 1:
            writer.note(_SEVERAL_LINES, str(path.relative_to(self.place)))
        return found

    def _add_row(self, path: str, captions: Captions, writer: IndexWriter) -> None:
        texts, reason = captions
        width = height = length = 0
        try:
            if no_plain_file(self.place / path):
                writer.note(_NO_FILES, path)
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


class _Metadata:
    """What metadata files say.

    Args:
        root: folder of the data.
        column: where captions stand; "" finds it.

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
        for file, path in zip(directory.files, directory.paths(), strict=True):
            if file not in METADATA_FILES:
                continue
            with suppress(OSError):
                if no_plain_file(self._root / path):
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

    def join_spellings(self, walk: Callable[[], Iterator[Directory]]) -> None:
        """Give captions to the pictures whose names are spelled otherwise in Unicode.

        Where several pictures differ in nothing else, none of them is taken.
        """
        wanted = {composed(path) for path in self.captions if not path.isascii()}
        if not wanted:
            return
        there: defaultdict[str, set[str]] = defaultdict(set)
        for directory in walk():
            for path in directory.paths():
                if not path.isascii() and composed(path) in wanted:
                    there[composed(path)].add(path)
        for path in [path for path in self.captions if not path.isascii()]:
            spellings = there[composed(path)]
            if len(spellings) == 1 and path not in spellings:
                (spelling,) = spellings
                self.captions.setdefault(spelling, []).extend(self.captions.pop(path))


def _stamp(path: Path) -> str:
    """Size and time of the last change of a file, "" where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_size}:{found.st_mtime_ns}"
