"""What the headers of one tar shard say: which members are a sample, and what belongs to none."""

import os
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torchtitan_flux.data.decode import header_size
from torchtitan_flux.data.formats import IMAGE_SUFFIXES
from torchtitan_flux.data.sources.captions import (
    NO_CAPTION,
    Captions,
    captions_of_json,
    captions_of_text,
)

TEXT_BYTES = 2**24  # a longer .txt or .json is not a caption

CUT = "lies beyond the end of its shard"
UNCLEAR = "its key has several pictures or texts in the shard, and which belong together is unknown"

_AGAIN = "keys that are repeated in their shard, each time with a picture of their own"
_UNKNOWN = "pictures whose key has several pictures or texts, so that their captions are not known"
_FURTHER = "further pictures of a sample (names of several suffixes) that are not read"
_DOTTED = "members with a further dot in their names, where the key ends at the first"

_PADDING = 2**20
"""Zeros that tar programs may write behind the end, in bytes."""

_PICTURE = "picture"
_TEXTS = _TEXT, _RECORD, _CAPTION = "txt", "json", "caption"


class Picture(NamedTuple):
    """Where a picture lies in its shard, in bytes, and its size in pixels.

    Attributes:
        key: name up to its first dot, of the member that is the picture.
        reason: what is wrong with it by its header, "" when nothing is.
    """

    key: str
    offset: int
    length: int
    width: int
    height: int
    reason: str


class Sample(NamedTuple):
    """A picture with an id that no other one of its shard has."""

    name: str
    picture: Picture
    captions: Captions


class Lost(NamedTuple):
    """What a shard holds besides its samples: text and example of a note, items lost by it."""

    text: str
    example: str
    lost: int


class Extent(NamedTuple):
    """How much of a shard was read.

    Attributes:
        end: byte after the last member whose header could be read.
        size: bytes of the shard; of a damaged one, without the zeros that fill it up.
        damage: what is wrong with the shard, "" when nothing is.
        no_mark: nothing else is wrong with it than that the mark of its end is missing.
        refusal: what the operating system said when the shard could not be opened or read.
        refused_at: byte at which it could not be read; None when it could not be opened.
    """

    end: int = 0
    size: int = 0
    damage: str = ""
    no_mark: bool = False
    refusal: OSError | None = None
    refused_at: int | None = None


class _Run:
    """Members of one key that follow each other in a shard, each with its kind."""

    def __init__(self, key: str, members: Iterable[tuple[str, Picture | Captions]] = ()):
        self.key = key
        self.members = list(members)

    def is_plain(self) -> bool:
        """Whether no kind is there twice."""
        return len(self.members) == len({kind for kind, _ in self.members})

    def pictures(self) -> list[Picture]:
        return [value for _, value in self.members if isinstance(value, Picture)]

    def captions(self, prefer_json: bool) -> Captions:
        """Those of the first text that says anything; else why none does."""
        found = dict(self.members)
        order = (_RECORD, _TEXT, _CAPTION) if prefer_json else (_TEXT, _RECORD, _CAPTION)
        texts: list[Captions] = [found[kind] for kind in order if kind in found]  # pyright: ignore
        if said := next((captions for captions in texts if captions[0]), None):
            return said
        return (), next((why for _, why in texts if why != NO_CAPTION), NO_CAPTION)


class Scan:
    """Goes through one shard, header by header.

    Args:
        path: the shard.
        image: suffix of the members that are pictures, "jpg" or "seg.png"; "" for any that is read.
        column: key of the samples' .json that holds their captions; "" finds it.
        by_line: every line of a text is a caption of its own.

    Attributes:
        extent: how much of the shard was read.
        notes: what belongs to no sample.
    """

    def __init__(self, path: Path, image: str, column: str, by_line: bool):
        self.extent = Extent()
        self.notes: list[Lost] = []
        self._path = path
        self._image = image.lower().removeprefix(".")
        self._column = column
        self._by_line = by_line
        self._runs: list[_Run] = []
        self._current = ""  # key of the member before
        self._dotted: defaultdict[str, list[str]] = defaultdict(list)
        self._others: dict[str, str] = {}  # key -> a suffix that is not read

    def members(self) -> Iterator[int]:
        """Go through the shard; yields the position reached, in bytes, after each member."""
        try:
            with self._path.open("rb") as file:
                self._has(size=os.fstat(file.fileno()).st_size)
                try:
                    yield from self._through(file)
                except tarfile.TarError as error:
                    self._has(damage=str(error))
                except OSError:
                    self._has(refused_at=file.tell())
                    raise
                if self.extent.damage:
                    self._has(size=self.extent.size - _padding(file))
        except OSError as error:
            self._has(refusal=error.with_traceback(None))

    def _has(self, **changes: Any) -> None:
        self.extent = self.extent._replace(**changes)

    def _through(self, file: BinaryIO) -> Iterator[int]:
        with _open_tar(file) as tar:
            while (member := _next_member(tar)) is not None:
                if tar.offset <= self.extent.end:  # would go round in circles
                    raise tarfile.ReadError(f"negative size at byte {member.offset}")
                self._has(end=tar.offset)
                self._take(tar, member)
                yield min(tar.offset, self.extent.size)
        end, size = self.extent.end, self.extent.size
        self._has(damage=_what_follows(file, end, size), no_mark=end == size > 0)

    def _take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Take down a member that is of use."""
        folder, _, file = member.name.rpartition("/")
        stem, dot, suffix = file.partition(".")
        suffix = suffix.lower()
        if not (stem and dot) or member.isdir():
            return
        key = f"{folder}/{stem}" if folder else stem
        is_picture = suffix == self._image if self._image else _is_image(file)
        if key != key.encode("utf-8", "replace").decode():
            name, lost = ascii(member.name), int(is_picture)
            self.notes.append(Lost("members whose names are not UTF-8", name, lost))
            return
        key = key.removeprefix("./")
        follows, self._current = key == self._current, key
        if "." in suffix and suffix != self._image:
            if _is_image(file) or suffix.endswith(_TEXTS):
                self._dotted[key].append(file)
        elif not is_picture and suffix not in _TEXTS:
            self._others[key] = suffix
        elif not member.isfile() or member.issparse():
            lost = int(is_picture)
            self.notes.append(Lost("members that are links or sparse files", member.name, lost))
        else:
            same = self._runs and self._runs[-1].key == key and follows
            run = self._runs[-1] if same else _Run(key)
            if not same:
                self._runs.append(run)
            if is_picture:
                run.members.append((_PICTURE, self._picture(tar, member, key)))
            elif (data := self._content(tar, member)) is not None:
                run.members.append((suffix, self._captions(suffix, data)))

    def _is_complete(self, member: tarfile.TarInfo) -> bool:
        return member.offset_data + member.size <= self.extent.size

    def _picture(self, tar: tarfile.TarFile, member: tarfile.TarInfo, key: str) -> Picture:
        width, height, reason = 0, 0, CUT
        if self._is_complete(member) and (content := tar.extractfile(member)):
            with content:
                width, height, reason = header_size(content)
        return Picture(key, member.offset_data, member.size, width, height, reason)

    def _content(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
        if self._is_complete(member) and (content := tar.extractfile(member)):
            with content:
                return content.read(TEXT_BYTES)
        return None

    def _captions(self, suffix: str, data: bytes) -> Captions:
        if suffix == _RECORD:
            return captions_of_json(data, self._column, self._by_line)
        return captions_of_text(data, self._by_line, f".{suffix}")

    def samples(self) -> Iterator[Sample]:
        """What is trained on, in the order in which the shard first names it; fills `notes`."""
        runs = _other_spellings_joined(_samples_of(self._runs))
        pictured = {run.key for run, _ in runs if run.pictures()}
        issued: set[str] = set()
        for run, is_clear in runs:
            captions = run.captions(bool(self._column)) if is_clear else ((), UNCLEAR)
            for picture in run.pictures():
                name, number = picture.key, 1
                while name in issued or (number > 1 and name in pictured):
                    number += 1
                    name = f"{picture.key}#{number}"
                issued.add(name)
                if not is_clear:
                    self.notes.append(Lost(_UNKNOWN, name, 0))
                elif number > 1:
                    self.notes.append(Lost(_AGAIN, name, 0))
                yield Sample(name, picture, captions)
            if run.key not in pictured:
                other = self._others.get(run.key)
                what = f": .{other} is not read" if other else ""
                self.notes.append(Lost(f"samples without a picture{what}", run.key, 0))
        for key, files in self._dotted.items():
            for file in files:
                if not _is_image(file):
                    self.notes.append(Lost(_DOTTED, file, 0))
                elif key in pictured:
                    self.notes.append(Lost(_FURTHER, file, 0))
                else:
                    self.notes.append(Lost(_DOTTED, file, 1))


def _samples_of(runs: list[_Run]) -> list[tuple[_Run, bool]]:
    """Runs that are a sample each, and whether it is known what belongs to their pictures.

    A key with at most one member of each kind is one sample, wherever these stand. One that is
    repeated is a sample each time if each of its runs is whole.
    """
    by_key: defaultdict[str, list[_Run]] = defaultdict(list)
    for run in runs:
        by_key[run.key].append(run)
    found = []
    for run in runs:
        same = by_key[run.key]
        whole = _Run(run.key, (member for part in same for member in part.members))
        if whole.is_plain():
            if run is same[0]:
                found.append((whole, True))
        else:
            found.append((run, _each_is_whole(same)))
    return found


def _each_is_whole(runs: list[_Run]) -> bool:
    """Whether runs of one key are a sample each, with no text that may belong to another one.

    Where one of them lacks a text, a text that comes before its picture may be that one's.
    """
    if not all(run.is_plain() and run.pictures() for run in runs):
        return False
    first = {run.members[0][0] for run in runs}
    return first == {_PICTURE} or all(len(run.members) > 1 for run in runs)


def _other_spellings_joined(runs: list[tuple[_Run, bool]]) -> list[tuple[_Run, bool]]:
    """A picture whose only text has its key in another of Unicode's spellings is one with it.

    macOS writes é as two characters (NFD), most others as one (NFC).
    """
    if all(run.pictures() for run, _ in runs):
        return runs
    by_spelling: defaultdict[str, list[_Run]] = defaultdict(list)
    for run, _ in runs:
        by_spelling[unicodedata.normalize("NFC", run.key)].append(run)
    merged: dict[str, _Run] = {}
    for same in by_spelling.values():
        pictured = [run for run in same if run.pictures()]
        whole = _Run("", (member for run in same for member in run.members))
        if len(same) > 1 and len(pictured) == 1 and whole.is_plain():
            whole.key = pictured[0].key
            merged |= {run.key: whole for run in same}
    return [
        (merged.get(run.key, run), is_clear)
        for run, is_clear in runs
        if run.key not in merged or run.pictures()
    ]


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _what_follows(file: BinaryIO, end: int, size: int) -> str:
    """What is wrong with a shard behind its last member; "" when nothing is.

    tarfile takes what is no header for the end, where 512 zeros have to be, and asks no further.
    """
    file.seek(end)
    mark = file.read(tarfile.BLOCKSIZE)
    if len(mark) < tarfile.BLOCKSIZE:
        return "ends without the mark that ends a tar file"
    if mark != bytes(tarfile.BLOCKSIZE):
        return f"no tar header at byte {end}"
    padding = file.read(_PADDING)
    if padding != bytes(len(padding)) or file.tell() < size:
        return f"{size - end} bytes follow the mark that ends a tar file, at byte {end}"
    return ""


def _padding(file: BinaryIO) -> int:
    """Zeros at the end of a file, as far as tar fills it up, in bytes."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - tarfile.RECORDSIZE, 0))
    tail = file.read()
    return len(tail) - len(tail.rstrip(b"\0"))


def _open_tar(file: BinaryIO) -> tarfile.TarFile:
    with _any_damage_is_a_tar_error():
        return tarfile.open(fileobj=file, mode="r:")


def _next_member(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    # Else it would keep all of them.
    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
    with _any_damage_is_a_tar_error():
        return tar.next()


@contextmanager
def _any_damage_is_a_tar_error() -> Iterator[None]:
    """tarfile meets garbage in extended headers as ValueError, KeyError, OverflowError, …"""
    try:
        yield
    except (tarfile.TarError, OSError):
        raise
    except Exception as error:
        raise tarfile.ReadError(f"{type(error).__name__}: {error}") from error
