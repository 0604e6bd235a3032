"""Tar shards as WebDataset writes them, read at random: each item by its offset in its shard."""

import json
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from torchtitan_flux.data.decode import header_size
from torchtitan_flux.data.sources import listing
from torchtitan_flux.data.sources.captions import NO_CAPTION, Captions, captions_of_file
from torchtitan_flux.data.sources.index import IndexWriter, Row
from torchtitan_flux.data.sources.index_cache import open_index
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.pairing import composed, is_picture
from torchtitan_flux.data.sources.source import SourceOptions, Split, UnreadableItem
from torchtitan_flux.data.sources.split import part_of, split_files
from torchtitan_flux.formatting import listed

CUT = "lies beyond the end of its shard"
UNCLEAR = "its key has several pictures or texts in the shard, and which belong together is unknown"

_REPEATED = "keys that are repeated in their shard, each time with a picture of their own"
_UNCLEAR = "pictures whose key has several pictures or texts, so that their captions are not known"
_FURTHER = "further pictures of a sample (names of several suffixes) that are not read"
_DOTTED = "members with a further dot in their names, where the key ends at the first"

_COMPRESSED = re.compile(r"\.(tar\.(gz|zstd?|xz|bz2|lz4|z)|t(gz|zst|xz|bz2?))$", re.IGNORECASE)
_TEXT_BYTES = 2**24  # a longer .txt or .json is not a caption
_PADDING = 2**20  # zeros that tar programs may write behind the end, in bytes
_PICTURE = "picture"
_TEXTS = ("txt", "json", "caption")


class TarSource(IndexedSource):
    """The samples of local tar shards; ids are "<shard>/<key>", "<shard>/<key>#2" if repeated.

    Shards come in the order of their names, or of the braces that spell them out; samples in the
    order in which a shard first names them. `image_column` is the suffix of pictures, "" for any;
    `caption_column` a key of the samples' .json, "" prefers their .txt.
    """

    name = "webdataset"

    def __init__(self, split: Split, options: SourceOptions):
        self.title = path = str(options.path)
        self.options = options
        self.place, (names, undecodable, self._refused) = _shards(path, options.index_folder)
        parts = {name: part_of(name) for name in names}
        part, self.shared, names, left_out = split_files(parts, split, path, both=True)
        self.left_out = left_out | {listing.NOT_UTF8: undecodable}
        self._shards: list[str] = []
        for name in names:
            what = ""
            with suppress(OSError):  # noted when the shard is read
                what = listing.not_regular(self.place / name)
            if what:
                self.left_out.setdefault(f"files left out, each is {what}", []).append(name)
            else:
                self._shards.append(name)
        if not self._shards:
            why = "; ".join(text for text, names in self.left_out.items() if names)
            raise ValueError(f"{path} holds no shard: {why}")
        if compressed := [str(self.place / n) for n in self._shards if _COMPRESSED.search(n)]:
            raise ValueError(
                f"{listed(compressed, 3)}: compressed tar files cannot be read at random: unpack "
                "them to plain .tar, or move them out of the data"
            )
        # Relative, since folders are moved. A folder's own shards may change, a pattern may not.
        read_as = options.image_column, options.caption_column, options.captions_by_line
        self.identity = json.dumps([*read_as, part, os.path.relpath(path, self.place)])
        super().__init__(self.name, path, open_index(self, options.index_folder), options)

    def facts(self, stored: Mapping[str, str]) -> dict[str, str]:
        return {shard: listing.stamp(self.place / shard) for shard in self._shards}

    def build(self, writer: IndexWriter, bar: tqdm) -> None:
        foreign = []
        for path in (self.place / shard for shard in self._shards):
            with suppress(OSError), path.open("rb") as file:  # noted when the shard is read
                if (head := file.read(listing.HEAD)) and (what := listing.foreign_content(head)):
                    foreign.append(f"{path} {what}")
        if foreign:
            raise ValueError(listed(foreign, 3))
        for folder, error in self._refused:
            writer.refused(folder, error)
        sizes = [int(mark.split(":")[0] or 0) for mark in self.facts({}).values()]
        bar.unit, bar.unit_scale, bar.total = "B", True, sum(sizes)
        scans = []
        for number, shard in enumerate(self._shards):
            scans.append(ShardScan(self.place, shard, number, self.options, writer))
            scans[-1].run(bar.update)
        self._note_losses(writer, scans)
        if not writer.rows:
            why = [f"{note.text}: {', '.join(note.examples)}" for note in writer.notes.values()]
            empty = f"the {len(scans)} tar files of {self.title} hold no pictures"
            raise ValueError("; ".join([empty, *why]))

    def _note_losses(self, writer: IndexWriter, scans: list["ShardScan"]) -> None:
        """Note the shards that were not read to their end, and about how many samples that cost:
        by the bytes that are left, else by what other shards hold."""
        whole = [scan.samples for scan in scans if not scan.damage and not scan.refusal]
        usual = sum(whole) / max(len(whole), 1)
        sample_bytes = sum(scan.end for scan in scans) / max(writer.rows, 1)
        for scan in scans:
            unread = scan.size - scan.end
            lost = unread / sample_bytes if unread > 0 < sample_bytes else usual - scan.samples
            # Where only the mark of the end is missing, every member is there.
            lost = 0 if scan.end == scan.size > 0 else max(round(lost), 1)
            if scan.refusal is not None:
                writer.refused(self.place / scan.shard, scan.refusal, scan.refused_at, lost)
            elif scan.damage:
                writer.note("damaged shards", f"{scan.shard}: {scan.damage}", lost=lost)

    def read(self, row: Row) -> bytes:
        with (self.place / self._shards[row.shard]).open("rb") as file:
            file.seek(row.offset)
            data = file.read(row.length)
        if len(data) < row.length:
            raise UnreadableItem(row.item_id, CUT)
        return data


def _shards(given: str, without: Path | None) -> tuple[Path, listing.Files]:
    """(folder, files in it that a path or a pattern names)."""
    path = Path(given)
    if path.is_dir():
        found = listing.files_below(path.absolute(), without)
        names = [n for n in found.names if n.lower().endswith(".tar") or _COMPRESSED.search(n)]
        if not names:
            raise ValueError(f"{given} holds no .tar files")
        return path.absolute(), found._replace(names=sorted(names))
    files = [path] if path.exists() else listing.matches(given)
    if missing := [str(file) for file in files if not file.exists()]:
        remote = "; shards are read where they lie: download them" if "://" in given else ""
        raise ValueError(f"{listed(missing, 1)} does not exist{remote}")
    if not files:
        raise ValueError(f"no file matches {given}")
    files = [file.absolute() for file in files]
    place = Path(os.path.commonpath([file.parent for file in files]))
    names = [file.relative_to(place).as_posix() for file in files]
    return place, listing.Files(names, [], [])


@dataclass
class _Sample:
    """Members of one key: (kind, `Row` or captions); `is_clear` which belong together."""

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
        why = next((reason for _, reason in texts if reason not in ("", NO_CAPTION)), NO_CAPTION)
        return next((text for text in texts if text[0]), ((), why))


@dataclass
class ShardScan:
    """Goes through one shard, header by header, and writes what it holds into an index."""

    place: Path
    shard: str
    number: int
    options: SourceOptions
    writer: IndexWriter
    samples: int = 0  # that were found
    size: int = 0  # bytes of the shard
    end: int = 0  # byte after the last member whose header could be read
    damage: str = ""
    refusal: OSError | None = None  # why the system did not open or read the shard
    refused_at: int | None = None  # byte at which it could not be read
    members: list[tuple[str, str, Any]] = field(default_factory=list)  # key, kind, value
    dotted: list[tuple[str, str]] = field(default_factory=list)  # key, file
    others: dict[str, str] = field(default_factory=dict)  # key -> a suffix that is not read

    def run(self, progress: Callable[[int], object]) -> None:
        """Go through the shard; `progress` is given each member's bytes."""
        try:
            with (self.place / self.shard).open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                try:
                    self._read(file, progress)
                except OSError:
                    self.refused_at = file.tell()
                    raise
                except Exception as error:
                    # tarfile meets garbage in headers as ValueError, KeyError, OverflowError, …
                    self.damage = f"{type(error).__name__}: {error}"
        except OSError as error:
            self.refusal = error
        self._write()

    def _note(self, text: str, name: str, lost: int = 0) -> None:
        self.writer.note(text, f"{self.shard}/{name}", lost=lost)

    def _read(self, file: BinaryIO, progress: Callable[[int], object]) -> None:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # pyright: ignore  (else it would keep all of them)
                if tar.offset <= self.end:  # would go round in circles
                    raise tarfile.ReadError(f"negative size at byte {member.offset}")
                progress(min(tar.offset, self.size) - self.end)
                self.end = tar.offset
                self._add_member(tar, member)
        # tarfile takes what is no header for the end, where zeros have to be, and looks no further.
        file.seek(self.end)
        mark = file.read(tarfile.BLOCKSIZE)
        if len(mark) < tarfile.BLOCKSIZE:
            self.damage = "ends without the mark that ends a tar file"
        elif any(mark):
            self.damage = f"no tar header at byte {self.end}"
        elif any(file.read(_PADDING)) or file.tell() < self.size:
            follows = f"{self.size - self.end} bytes follow the mark that ends a tar file"
            self.damage = f"{follows}, at byte {self.end}"

    def _add_member(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        folder, _, file = member.name.rpartition("/")
        stem, dot, suffix = file.partition(".")
        suffix = suffix.lower()
        if not (stem and dot) or member.isdir():
            return
        key = os.path.join(folder, stem).removeprefix("./")
        named = self.options.image_column.lower().removeprefix(".")
        pictured = suffix == named if named else is_picture(file)
        kind, value = "", None
        if not listing.is_unicode(key):
            self._note("members whose names are not UTF-8", ascii(member.name), int(pictured))
            return
        if "." in suffix and suffix != named:
            if is_picture(file) or suffix.endswith(_TEXTS):
                self.dotted.append((key, file))
        elif not pictured and suffix not in _TEXTS:
            self.others[key] = suffix
        elif not member.isfile() or member.issparse():
            self._note("members that are links or sparse files", member.name, int(pictured))
        else:
            at, length = member.offset_data, member.size
            content = tar.extractfile(member) if at + length <= self.size else None
            if pictured:
                kind = _PICTURE
                width, height, reason = header_size(content) if content else (0, 0, CUT)
                value = Row(key, self.number, at, length, width, height, (), reason)
            elif content:
                kind = suffix
                column, by_line = self.options.caption_column, self.options.captions_by_line
                value = captions_of_file(content.read(_TEXT_BYTES), f".{suffix}", column, by_line)
        self.members.append((key, kind, value))

    def _write(self) -> None:
        """Rows in the order in which the shard first names their samples, and what is odd."""
        samples = _joined_spellings(_samples(self.members))
        pictured = {sample.key for sample in samples if sample.pictures()}
        issued: set[str] = set()
        for sample in samples:
            captions, reason = sample.captions(bool(self.options.caption_column))
            for row in sample.pictures():
                name, number = row.item_id, 1
                while name in issued or (number > 1 and name in pictured):
                    number += 1
                    name = f"{row.item_id}#{number}"
                issued.add(name)
                if not sample.is_clear or number > 1:
                    self._note(_REPEATED if sample.is_clear else _UNCLEAR, name)
                why = row.reason if not reason or row.reason == CUT else reason
                item_id = f"{self.shard}/{name}"
                self.writer.add(row._replace(item_id=item_id, captions=captions, reason=why))
            if sample.key not in pictured:
                other = self.others.get(sample.key)
                what = f": .{other} is not read" if other else ""
                self._note(f"samples without a picture{what}", sample.key)
        self.samples = len(issued)
        for key, file in self.dotted:
            further = is_picture(file) and key in pictured
            lost = int(is_picture(file) and not further)
            self._note(_FURTHER if further else _DOTTED, file, lost)


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
    """Whether runs of one key are a sample each. Where one of them lacks a text, a text that comes
    before its picture may be that one's."""
    pictures_first = all(run.members[0][0] == _PICTURE for run in runs)
    texts = all(len(run.members) > 1 for run in runs)
    return all(run.is_plain() and run.pictures() for run in runs) and (pictures_first or texts)


def _joined_spellings(samples: list[_Sample]) -> list[_Sample]:
    """A picture whose only text has its key in another of Unicode's spellings is one with it."""
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
