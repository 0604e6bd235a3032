"""What the headers of one tar shard say: which members are a sample, and what belongs to none."""

import os
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from torchtitan_flux.data.decode import header_size
from torchtitan_flux.data.sources.captions import NO_CAPTION, Captions, captions_of_file
from torchtitan_flux.data.sources.index import IndexWriter, Row
from torchtitan_flux.data.sources.pairing import composed, is_picture
from torchtitan_flux.data.sources.source import SourceOptions

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
_TEXTS = ("txt", "json", "caption")


@dataclass
class _Sample:
    """Members of one key: (kind, `Row` of a picture or captions of a text).

    `is_clear`: which of them belong together is known.
    """

    key: str
    members: list[tuple[str, Any]]
    is_clear: bool = True

    def is_plain(self) -> bool:
        """Whether no kind is there twice."""
        return len(self.members) == len(dict(self.members))

    def pictures(self) -> list[Row]:
        return [row for kind, row in self.members if kind == _PICTURE]

    def captions(self, prefer_json: bool) -> Captions:
        """Those of the first text that says anything; else why none does."""
        if not self.is_clear:
            return (), UNCLEAR
        found = dict(self.members)
        order = sorted(_TEXTS, key=lambda kind: kind != "json") if prefer_json else _TEXTS
        texts: list[Captions] = [found[kind] for kind in order if kind in found]
        reasons = [(reason == NO_CAPTION, reason) for _, reason in texts]
        return next(
            (text for text in texts if text[0]), ((), min(reasons, default=("", NO_CAPTION))[1])
        )


class ShardScan:
    """Goes through one shard, header by header, and writes what it holds into an index.

    Args:
        place: folder of the data.
        shard: name of the file in it.
        number: of the shard.
        options: image_column (suffix of the members that are pictures, "jpg" or "seg.png"; "" for
            any that is read), caption_column (key of the samples' .json that holds their captions;
            "" finds it), captions_by_line.
        writer: of the index.

    Attributes:
        samples: that were found.
        end: byte after the last member whose header could be read.
        size: bytes of the shard; of a damaged one, without the zeros that fill it up.
        damage: what is wrong with the shard, "" when nothing is.
        no_mark: nothing else is wrong with it than that the mark of its end is missing.
        refusal: what the operating system said when the shard could not be opened or read.
        refused_at: byte at which it could not be read; None when it could not be opened.
    """

    def __init__(
        self, place: Path, shard: str, number: int, options: SourceOptions, writer: IndexWriter
    ):
        self.shard = shard
        self.samples = self.end = self.size = 0
        self.damage, self.no_mark = "", False
        self.refusal: OSError | None = None
        self.refused_at: int | None = None
        self._number, self._options, self._writer = number, options, writer
        self._image = options.image_column.lower().removeprefix(".")
        self._members: list[tuple[str, str, Any]] = []  # key, kind ("" for others), value
        self._dotted: defaultdict[str, list[str]] = defaultdict(list)
        self._others: dict[str, str] = {}  # key -> a suffix that is not read
        self._path = place / shard

    def run(self, progress: Callable[[int], object]) -> None:
        """Go through the shard; tells `progress` how many bytes were passed, member by member."""
        try:
            with self._path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                try:
                    self._read(file, progress)
                except tarfile.TarError as error:
                    self.damage = str(error)
                except OSError:
                    self.refused_at = file.tell()
                    raise
                if self.damage:
                    self.size -= _padding(file)
        except OSError as error:
            self.refusal = error
        self._write()

    def _note(self, text: str, name: str, lost: int = 0) -> None:
        self._writer.note(text, f"{self.shard}/{name}", lost=lost)

    def _read(self, file: BinaryIO, progress: Callable[[int], object]) -> None:
        with _any_damage_is_a_tar_error():
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  (closed below)
        with tar:
            while True:
                tar.members = []  # pyright: ignore  (else it would keep all of them)
                with _any_damage_is_a_tar_error():
                    member = tar.next()
                if member is None:
                    break
                if tar.offset <= self.end:  # would go round in circles
                    raise tarfile.ReadError(f"negative size at byte {member.offset}")
                progress(min(tar.offset, self.size) - self.end)
                self.end = tar.offset
                self._take(tar, member)
        self.no_mark = self.end == self.size > 0
        self.damage = _what_follows(file, self.end, self.size)

    def _take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Take down a member that is of use."""
        folder, _, file = member.name.rpartition("/")
        stem, dot, suffix = file.partition(".")
        suffix = suffix.lower()
        if not (stem and dot) or member.isdir():
            return
        key = os.path.join(folder, stem).removeprefix("./")
        pictured = suffix == self._image if self._image else is_picture(file)
        kind, value = "", None
        if key != key.encode("utf-8", "replace").decode():
            self._note("members whose names are not UTF-8", ascii(member.name), int(pictured))
            return
        if "." in suffix and suffix != self._image:
            if is_picture(file) or suffix.endswith(_TEXTS):
                self._dotted[key].append(file)
        elif not pictured and suffix not in _TEXTS:
            self._others[key] = suffix
        elif not member.isfile() or member.issparse():
            self._note("members that are links or sparse files", member.name, int(pictured))
        else:
            cut = member.offset_data + member.size > self.size
            content = None if cut else tar.extractfile(member)
            if pictured:
                kind = _PICTURE
                width, height, reason = header_size(content) if content else (0, 0, CUT)
                start, length = member.offset_data, member.size
                value = Row(key, self._number, start, length, width, height, (), reason)
            elif content:
                kind = suffix
                column, by_line = self._options.caption_column, self._options.captions_by_line
                text = content.read(TEXT_BYTES)
                value = captions_of_file(text, f".{suffix}", column, by_line)
        self._members.append((key, kind, value))

    def _write(self) -> None:
        """Rows in the order in which the shard first names their samples, and what is odd."""
        samples = _joined_spellings(_samples(self._members))
        pictured = {sample.key for sample in samples if sample.pictures()}
        issued: set[str] = set()
        for sample in samples:
            captions, reason = sample.captions(bool(self._options.caption_column))
            for row in sample.pictures():
                name, number = row.item_id, 1
                while name in issued or (number > 1 and name in pictured):
                    number += 1
                    name = f"{row.item_id}#{number}"
                issued.add(name)
                if not sample.is_clear or number > 1:
                    self._note(_AGAIN if sample.is_clear else _UNKNOWN, name)
                why = row.reason if not reason or row.reason == CUT else reason
                item_id = f"{self.shard}/{name}"
                self._writer.add(row._replace(item_id=item_id, captions=captions, reason=why))
            if sample.key not in pictured:
                other = self._others.get(sample.key)
                what = f": .{other} is not read" if other else ""
                self._note(f"samples without a picture{what}", sample.key)
        self.samples = len(issued)
        for key, files in self._dotted.items():
            for file in files:
                if is_picture(file) and key in pictured:
                    self._note(_FURTHER, file)
                else:
                    self._note(_DOTTED, file, int(is_picture(file)))


def _samples(members: list[tuple[str, str, Any]]) -> list[_Sample]:
    """A key with at most one member of each kind is one sample, wherever these stand. One that is
    repeated is a sample each time if each of its runs of members is whole."""
    by_key: defaultdict[str, list[_Sample]] = defaultdict(list)
    runs = []
    for key, group in groupby(members, key=lambda member: member[0]):
        run = _Sample(key, [(kind, value) for _, kind, value in group if kind])
        if run.members:
            runs.append(run)
            by_key[key].append(run)
    found = []
    for run in runs:
        same = by_key[run.key]
        whole = _Sample(run.key, [member for part in same for member in part.members])
        if not whole.is_plain():
            found.append(_Sample(run.key, run.members, _each_is_whole(same)))
        elif run is same[0]:
            found.append(whole)
    return found


def _each_is_whole(runs: list[_Sample]) -> bool:
    """Whether runs of one key are a sample each, with no text that may belong to another one.

    Where one of them lacks a text, a text that comes before its picture may be that one's.
    """
    if not all(run.is_plain() and run.pictures() for run in runs):
        return False
    return all(run.members[0][0] == _PICTURE for run in runs) or all(
        len(run.members) > 1 for run in runs
    )


def _joined_spellings(samples: list[_Sample]) -> list[_Sample]:
    """A picture whose only text has its key in another of Unicode's spellings is one with it.

    macOS writes é as two characters (NFD), most others as one (NFC).
    """
    by_spelling: defaultdict[str, list[_Sample]] = defaultdict(list)
    for sample in samples:
        by_spelling[composed(sample.key)].append(sample)
    for same in by_spelling.values():
        pictured = [sample for sample in same if sample.pictures()]
        whole = _Sample("", [member for sample in same for member in sample.members])
        if len(same) > 1 and len(pictured) == 1 and whole.is_plain():
            for sample in same:
                sample.members = whole.members if sample is pictured[0] else []
    return [sample for sample in samples if sample.members]


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


@contextmanager
def _any_damage_is_a_tar_error() -> Iterator[None]:
    """tarfile meets garbage in extended headers as ValueError, KeyError, OverflowError, …"""
    try:
        yield
    except (tarfile.TarError, OSError):
        raise
    except Exception as error:
        raise tarfile.ReadError(f"{type(error).__name__}: {error}") from error
