"""Tar shards as WebDataset writes them, read at random: each item by its offset in its shard."""

import json
import os
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from torchtitan_flux.data.formats import formats
from torchtitan_flux.data.sources.foreign import HEAD, foreign_content, no_plain_file
from torchtitan_flux.data.sources.index import IndexWriter, Row
from torchtitan_flux.data.sources.index_cache import open_index
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.listing import PATH_KEY, given_path, matches, walk
from torchtitan_flux.data.sources.parts import not_read, own_parts
from torchtitan_flux.data.sources.parts import part_of as part_of_name
from torchtitan_flux.data.sources.source import Source, SourceOptions, Split, UnreadableItem
from torchtitan_flux.data.sources.split import part_or_share
from torchtitan_flux.data.sources.webdataset_scan import CUT, Extent, Sample, Scan

OPEN_SHARDS = 64
"""Shards that one process keeps open."""
_UNPACK = {
    ".tar.gz": "gunzip",
    ".tgz": "gunzip",
    ".tar.zst": "unzstd",
    ".tar.zstd": "unzstd",
    ".tzst": "unzstd",
    ".tar.xz": "unxz",
    ".txz": "unxz",
    ".tar.bz2": "bunzip2",
    ".tbz2": "bunzip2",
    ".tbz": "bunzip2",
    ".tar.lz4": "unlz4",
    ".tar.z": "uncompress",
}
"""Suffixes of compressed tar files, and the program that unpacks each."""

CC12M_TEST = "tests/assets/cc12m_test"
REPOSITORY = Path(__file__).resolve().parents[3]


def webdataset_source(name: str, split: Split, options: SourceOptions) -> Source:
    """One split of tar shards: its own shards, where they are named after parts, or a share."""
    source = TarSource(name, split, options)
    return part_or_share(source, source.shared, split, options)


class TarSource(IndexedSource):
    """The samples of local tar shards; ids are "<shard>/<key>", keys as in WebDataset.

    Shards come in the order of their names, or of the braces that spell them out; samples in the
    order in which a shard first names them. The second sample of a key that a shard repeats is
    "<shard>/<key>#2".

    Args:
        name: what the configuration calls the data set.
        split: which part is read, and whose path key messages name.
        options: path (a folder, a tar file or a pattern), image_column (the suffix of pictures, ""
            for any), caption_column (a key of the samples' .json; "" prefers their .txt),
            index_folder, what they say of captions and of pictures.

    Attributes:
        shared: no shards were named for a split, so both splits see all of them.

    Raises:
        ValueError: there are no shards, or no pictures in them, or they are something else.
    """

    def __init__(self, name: str, split: Split, options: SourceOptions):
        given = given_path(options.path, split, "a folder of tar files, one of them, or a pattern")
        found = find_shards(given, split, options.index_folder)
        recipe = _Shards(given, found, options, split)
        super().__init__(name, given, open_index(recipe, options.index_folder), options)
        self.shared = not found.part
        self._files = _ShardFiles([found.place / shard for shard in found.names])

    def read(self, row: Row) -> bytes:
        data = self._files.read(row.shard, row.offset, row.length)
        if len(data) < row.length:
            raise UnreadableItem(row.item_id, CUT)
        return data


class Shards(NamedTuple):
    """What a path means.

    Attributes:
        place: a folder.
        names: tar files that are read, relative to it.
        part: which part of the data they are; "" when they are not parted.
        left_out: files that are not read, by why.
        refused: folders that the operating system does not list, and what it says.
    """

    place: Path
    names: list[str]
    part: str
    left_out: dict[str, list[str]]
    refused: list[tuple[Path, OSError]]


def find_shards(given: str, split: Split, without: Path | None) -> Shards:
    """The tar files that a path means for a split.

    Args:
        given: a folder, all of whose tar files are meant, one tar file, or a pattern.
        split: "train" or "held_out".
        without: a folder that is not searched.

    Raises:
        ValueError: there are none, some that the pattern spells out are missing, or some are
            compressed.
    """
    try:
        return _found(given, split, without)
    except OSError as error:
        where = error.filename or given
        raise ValueError(f"{PATH_KEY[split]}: {where}: {error.strerror}") from error


def _found(given: str, split: Split, without: Path | None) -> Shards:
    key, path = PATH_KEY[split], Path(given)
    directories = list(walk(path, without, strict=False)) if path.is_dir() else []
    if directories:
        place = path.absolute()
        names = sorted(name for directory in directories for name in directory.paths())
        names = [name for name in names if name.lower().endswith((".tar", *_UNPACK))]
        if not names:
            raise ValueError(f"{key}: {given} holds no .tar files")
    else:
        files = [path] if path.exists() else matches(given)
        missing = [str(file) for file in files if not file.exists()]
        if missing:
            remote = "; shards are read where they lie: download them" if "://" in given else ""
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{key}: {missing[0]}{more} does not exist{remote}")
        if not files:
            raise ValueError(f"{key}: no file matches {given}")
        files = [file.absolute() for file in files]
        place = Path(os.path.commonpath([file.parent for file in files]))
        names = [file.relative_to(place).as_posix() for file in files]
    parts = {name: part_of_name(name) for name in names}
    there = set(parts.values()) - {""}
    both = "train" in there and len(there) > 1
    own = own_parts(there, split, given) if both else None
    if own is not None:
        names = [name for name in names if parts[name] == own[0]]
    left_out = not_read(parts, own)
    kinds = {name: _kind(place / name) for name in names}
    for name, kind in kinds.items():
        if kind:
            left_out.setdefault(f"files left out, each is {kind}", []).append(name)
    names = [name for name, kind in kinds.items() if not kind]
    if not names:
        name, kind = next(iter(kinds.items()))
        raise ValueError(f"{key}: {place / name} is {kind}, no file")
    if nameless := [d.name or given for d in directories for _ in range(d.unnameable)]:
        left_out["files whose names are not UTF-8 are left out"] = nameless
    refused = [(place / d.name, d.error) for d in directories if d.error]
    packed = [name for name in names if name.lower().endswith(tuple(_UNPACK))]
    if packed:
        command = next(c for suffix, c in _UNPACK.items() if packed[0].lower().endswith(suffix))
        raise ValueError(
            f"{key}: compressed tar files cannot be read at random: unpack "
            f"{_listed(place, packed)} to plain .tar (`{command} {packed[0]}`), or move them out "
            "of the data"
        )
    return Shards(place, names, own[0] if own else "", left_out, refused)


def _kind(path: Path) -> str:
    """`no_plain_file`, for one that may be refused: that is told of when the shard is read."""
    try:
        return no_plain_file(path)
    except OSError:
        return ""


def _listed(place: Path, names: list[str]) -> str:
    """The first of many files, in words."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(str(place / name) for name in names[:3]) + more


def cc12m_test_folder(split: Split) -> str:
    """The small data set of torchtitan's name `cc12m-test`, in this folder or the repository.

    Raises:
        ValueError: it is in neither, as when only a wheel is installed.
    """
    for root in (Path.cwd(), REPOSITORY):
        if (root / CC12M_TEST).is_dir():
            return str(root / CC12M_TEST)
    raise ValueError(
        f"{PATH_KEY[split]}: {CC12M_TEST} is neither here nor in {REPOSITORY}; "
        "scripts/make_test_assets.py of the repository writes it"
    )


class _ShardFiles:
    """Reads of byte ranges; holds at most OPEN_SHARDS files open, and none in a pickle.

    Reads name their offset, so that forked workers can share the files, and a file that is
    dropped while another thread reads from it is closed only when that read is done.
    """

    def __init__(self, paths: list[Path]):
        self._paths = paths
        self._open = lru_cache(OPEN_SHARDS)(_File)

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Bytes of one shard, fewer than `length` at its end only."""
        file = self._open(self._paths[shard])
        data = os.pread(file.descriptor, length, offset)
        while 0 < len(data) < length:  # Linux reads 2 GiB at a time, network file systems less
            more = os.pread(file.descriptor, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def __reduce__(self):
        return _ShardFiles, (self._paths,)


class _File:
    """A file descriptor that is closed with the last reference to it."""

    descriptor = -1

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close=os.close):  # at exit, `os` may be gone first
        if self.descriptor >= 0:
            close(self.descriptor)


class _Shards:
    """The recipe of a webdataset's index (`index_cache.Recipe`)."""

    kind = "webdataset"

    def __init__(self, given: str, found: Shards, options: SourceOptions, split: Split):
        self.title = given
        self.place = found.place
        self._read_as = options.image_column, options.caption_column, options.captions_by_line
        # Relative, since folders are moved. A folder's own shards may change, a pattern may not.
        self.identity = json.dumps(
            [*self._read_as, found.part, os.path.relpath(given, found.place)]
        )
        self._shards = found.names
        self._left_out, self._refused = found.left_out, found.refused
        self._split: Split = split

    def facts(self) -> dict[str, str]:
        stamps = [[shard, *self._stamp(shard)] for shard in self._shards]
        return {
            "shards": json.dumps(stamps),
            "left out": json.dumps(self._left_out),
            "formats": " ".join(formats()),
        }

    def _stamp(self, shard: str) -> tuple[int, int]:
        """Size and time of a shard; (0, 0) where the operating system refuses them."""
        try:
            found = (self.place / shard).stat()
        except OSError:
            return 0, 0
        return found.st_size, found.st_mtime_ns

    def change(self, stored: dict[str, str]) -> str:
        now = self.facts()
        before, after = (json.loads(facts["shards"]) for facts in (stored, now))
        stamps_before, stamps_now = ({name: rest for name, *rest in all} for all in (before, after))
        for name in sorted(stamps_before.keys() | stamps_now.keys()):
            if name not in stamps_now:
                return f"{name} is gone"
            if name not in stamps_before:
                return f"{name} is new"
            if stamps_before[name] != stamps_now[name]:
                return f"{name} has changed"
        if before != after:
            return "its shards come in another order"
        if stored["formats"] != now["formats"]:
            return "other formats can be read"
        return "" if stored["left out"] == now["left out"] else "other files are left out"

    def build(self, writer: IndexWriter, bar: tqdm) -> None:
        self._refuse_what_is_no_tar()
        for text, names in self._left_out.items():
            for name in names:
                writer.note(text, name)
        for folder, error in self._refused:
            writer.unopened(folder, error)
        sizes = [self._stamp(shard)[0] for shard in self._shards]
        bar.unit, bar.unit_scale, bar.total = "B", True, sum(sizes)
        done = 0
        read = []
        for number, (shard, size) in enumerate(zip(self._shards, sizes, strict=True)):
            scan = Scan(self.place / shard, *self._read_as)
            for position in scan.members():
                bar.update(done + position - bar.n)
            done += size
            bar.update(done - bar.n)
            before = writer.rows
            for sample in scan.samples():
                writer.add(_row(f"{shard}/{sample.name}", number, sample))
            for note in scan.notes:
                writer.note(note.text, f"{shard}/{note.example}", lost=note.lost)
            read.append(_Read(shard, writer.rows - before, scan.extent))
        self._note_losses(writer, read)
        if not writer.rows:
            why = "".join(f"; {note.text}: {', '.join(note.examples)}" for note in writer.notes)
            raise ValueError(
                f"{PATH_KEY[self._split]}: the {len(self._shards)} tar files of {self.title} hold "
                f"no pictures{why}"
            )

    def _refuse_what_is_no_tar(self) -> None:
        found = []
        for shard in self._shards:
            try:
                with (self.place / shard).open("rb") as file:
                    head = file.read(HEAD)
            except OSError:  # told of when the shard is read
                continue
            if head and (what := foreign_content(head, Path(shard).name)):
                found.append(f"{self.place / shard} {what}")
        if found:
            more = f" ({len(found) - 1} more files like it)" if len(found) > 1 else ""
            raise ValueError(f"{PATH_KEY[self._split]}: {found[0]}{more}")

    def _note_losses(self, writer: IndexWriter, read: "list[_Read]") -> None:
        """Note the shards that were not read to their end, and about how many samples that cost."""
        whole = [samples for _, samples, of in read if not of.damage and not of.refusal]
        usual = sum(whole) / len(whole) if whole else 0.0
        sample_bytes = sum(of.end for _, _, of in read) / max(writer.rows, 1)
        for shard, samples, of in read:
            unread = of.size - of.end
            if unread >= tarfile.BLOCKSIZE and sample_bytes:
                lost = max(round(unread / sample_bytes), 1)
            elif of.no_mark:
                lost = 0  # a writer that was not closed: every member is there
            else:
                lost = max(round(usual) - samples, 1)
            if of.refusal is not None:
                place = self.place / shard
                writer.unopened(place, of.refusal, at=of.refused_at, lost=lost)
            elif of.damage:
                writer.note("damaged shards", f"{shard}: {of.damage}", lost=lost)


class _Read(NamedTuple):
    """What came of one shard."""

    shard: str
    samples: int
    extent: Extent


def _row(item_id: str, shard: int, sample: Sample) -> Row:
    texts, reason = sample.captions
    _, offset, length, width, height, wrong = sample.picture
    if not reason or wrong == CUT:
        reason = wrong
    return Row(item_id, shard, offset, length, width, height, texts, reason)
