"""Tar shards as WebDataset writes them, read at random: each item by its offset in its shard."""

import json
import logging
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from torchtitan_flux.data.captions import Captions, captions_of_json, captions_of_text
from torchtitan_flux.data.decode import header_size
from torchtitan_flux.data.files import PATH_KEY, given_path, matches, walk
from torchtitan_flux.data.index import IndexWriter, Row
from torchtitan_flux.data.index_cache import open_index
from torchtitan_flux.data.indexed import IndexedSource
from torchtitan_flux.data.sources import SourceOptions, Split, UnreadableItem

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
OPEN_SHARDS = 64
"""Shards that one process keeps open."""
TEXT_BYTES = 2**24  # a longer .txt or .json is not a caption

CC12M_TEST = "tests/assets/cc12m_test"
REPOSITORY = Path(__file__).resolve().parents[2]

logger = logging.getLogger(__name__)


class TarSource(IndexedSource):
    """The samples of local tar shards; ids are "<shard>/<key>", keys as in WebDataset.

    Shards come in the order of their names, or of the braces that spell them out; samples in the
    order in which a shard first names them.

    Args:
        name: what the configuration calls the data set.
        split: whose path key messages name.
        options: path (a folder, a tar file or a pattern), caption_column (a key of the samples'
            .json; "" prefers their .txt), index_folder, what they say of captions and of pictures.

    Raises:
        ValueError: there are no shards, or no pictures in them.
    """

    def __init__(self, name: str, split: Split, options: SourceOptions):
        given = given_path(options.path, split, "a folder of tar files, one of them, or a pattern")
        place, shards = find_shards(given, split, options.index_folder)
        recipe = _Shards(given, place, shards, options, split)
        super().__init__(name, given, open_index(recipe, options.index_folder), options)
        self._files = _ShardFiles([place / shard for shard in shards])

    def read(self, row: Row) -> bytes:
        data = self._files.read(row.shard, row.offset, row.length)
        if len(data) < row.length:
            raise UnreadableItem(row.item_id, "lies beyond the end of its shard")
        return data


def find_shards(given: str, split: Split, without: Path | None) -> tuple[Path, list[str]]:
    """(a folder, the tar files that a path means, relative to it).

    Args:
        given: a folder, all of whose tar files are meant, one tar file, or a pattern.
        split: whose path key messages name.
        without: a folder that is not searched.

    Raises:
        ValueError: there are none, or some that the pattern spells out are missing.
    """
    key, path = PATH_KEY[split], Path(given)
    if path.is_dir():
        directories = list(walk(path, without))
        names = [name for directory in directories for name in directory.paths()]
        shards = sorted(name for name in names if name.lower().endswith(".tar"))
        if shards:
            return path.absolute(), shards
        packed = next((name for name in names if ".tar." in name.lower()), None)
        hint = f"; {packed} is compressed: unpack it to a plain .tar" if packed else ""
        raise ValueError(f"{key}: {given} holds no .tar files{hint}")
    files = [path] if path.is_file() else matches(given)
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        remote = "; shards are read where they lie: download them" if "://" in given else ""
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{key}: {missing[0]}{more} does not exist{remote}")
    if not files:
        raise ValueError(f"{key}: no file matches {given}")
    files = [file.absolute() for file in files]
    place = Path(os.path.commonpath([file.parent for file in files]))
    return place, [file.relative_to(place).as_posix() for file in files]


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


class _Image(NamedTuple):
    """Where an image lies, in bytes, and its size in pixels."""

    offset: int
    length: int
    width: int
    height: int
    complete: bool


class _Sample:
    """What members of one key have been met so far. Of two of a kind the later one counts."""

    image: _Image | None = None
    text: Captions | None = None
    record: Captions | None = None

    def captions(self, prefer_json: bool) -> Captions:
        """Of text and record the first that says anything; else why neither does."""
        found = (self.record, self.text) if prefer_json else (self.text, self.record)
        present = [captions for captions in found if captions is not None]
        fallback = present[0] if present else ((), "has no caption")
        return next((captions for captions in present if captions[0]), fallback)


class _Shards:
    """The recipe of a webdataset's index (`index_cache.Recipe`)."""

    kind = "webdataset"

    def __init__(
        self, given: str, place: Path, shards: list[str], options: SourceOptions, split: Split
    ):
        self.title = given
        self.place = place
        # Relative, since folders are moved. A folder's own shards may change, a pattern may not.
        self._column, self._by_line = options.caption_column, options.captions_by_line
        relative = os.path.relpath(given, place)
        self.identity = json.dumps([self._column, self._by_line, relative])
        self._shards = shards
        self._split: Split = split

    def facts(self) -> dict[str, str]:
        stamps = []
        for shard in self._shards:
            found = (self.place / shard).stat()
            stamps.append([shard, found.st_size, found.st_mtime_ns])
        return {"shards": json.dumps(stamps)}

    def change(self, stored: dict[str, str]) -> str:
        before, now = (json.loads(facts["shards"]) for facts in (stored, self.facts()))
        if before == now:
            return ""
        stamps_before, stamps_now = ({name: rest for name, *rest in all} for all in (before, now))
        for name in sorted(stamps_before.keys() | stamps_now.keys()):
            if name not in stamps_now:
                return f"{name} is gone"
            if name not in stamps_before:
                return f"{name} is new"
            if stamps_before[name] != stamps_now[name]:
                return f"{name} has changed"
        return "its shards come in another order"

    def build(self, writer: IndexWriter, bar: tqdm) -> None:
        bar.unit, bar.unit_scale = "B", True
        bar.total = sum((self.place / shard).stat().st_size for shard in self._shards)
        imageless = unnameable = done = 0
        for number, shard in enumerate(self._shards):
            scan = _Scan(self.place / shard, self._column, self._by_line)
            for position in scan.members():
                bar.update(done + position - bar.n)
            done += (self.place / shard).stat().st_size
            bar.update(done - bar.n)
            if scan.damage:
                logger.warning(
                    "%s is damaged (%s): its %d samples up to there are used",
                    self.place / shard,
                    scan.damage,
                    len(scan.samples),
                )
            unnameable += scan.unnameable
            for key, sample in scan.samples.items():
                if sample.image is None:
                    imageless += 1
                else:
                    captions = sample.captions(prefer_json=bool(self._column))
                    writer.add(_row(f"{shard}/{key}", number, sample.image, captions))
        if imageless:
            logger.warning("%s: %d samples have no picture", self.title, imageless)
        if unnameable:
            logger.warning("%s: %d members whose names are not UTF-8", self.title, unnameable)
        if not writer.rows:
            raise ValueError(
                f"{PATH_KEY[self._split]}: the {len(self._shards)} tar files of {self.title} hold "
                f"no pictures ({', '.join(IMAGES)})"
            )


def _row(item_id: str, shard: int, image: _Image, captions: Captions) -> Row:
    texts, reason = captions
    if not image.complete:
        reason = "lies beyond the end of its shard"
    offset, length, width, height, _ = image
    return Row(item_id, shard, offset, length, width, height, texts, reason)


class _Scan:
    """What the headers of one shard say.

    Attributes:
        samples: key -> sample, in the order in which they are first named.
        damage: what is wrong with the shard, "" when nothing is.
        unnameable: members left out because their names are not UTF-8.
    """

    def __init__(self, path: Path, column: str, by_line: bool):
        self.samples: dict[str, _Sample] = {}
        self.damage = ""
        self.unnameable = 0
        self._path = path
        self._column = column
        self._by_line = by_line

    def members(self) -> Iterator[int]:
        """Go through the shard; yields the position reached, in bytes, after each member."""
        end = 0
        try:
            with self._path.open("rb") as file, _open_tar(file) as tar:
                size = os.fstat(file.fileno()).st_size
                while (member := _next_member(tar)) is not None:
                    if tar.offset <= end:  # would go round in circles
                        raise tarfile.ReadError(f"negative size at byte {member.offset}")
                    end = tar.offset
                    if member.isfile() and not member.issparse():
                        self._note(tar, member, size)
                    yield min(end, size)
                file.seek(end)
                # tarfile takes what is no header for the end, where 512 zeros have to be.
                mark = file.read(tarfile.BLOCKSIZE)
                if mark != bytes(tarfile.BLOCKSIZE):
                    self.damage = "ends without the mark that ends a tar file"
                    if len(mark) == tarfile.BLOCKSIZE:
                        self.damage = f"no tar header at byte {end}"
        except (tarfile.TarError, OSError) as error:
            self.damage = str(error)

    def _note(self, tar: tarfile.TarFile, member: tarfile.TarInfo, size: int) -> None:
        """Take down a member that is of use."""
        folder, _, file = member.name.rpartition("/")
        stem, dot, suffix = file.partition(".")
        suffix = suffix.lower()
        if not (stem and dot) or suffix not in (*IMAGES, "txt", "json"):
            return
        key = f"{folder}/{stem}" if folder else stem
        if key != key.encode("utf-8", "replace").decode():
            self.unnameable += 1
            return
        sample = self.samples.setdefault(key.removeprefix("./"), _Sample())
        complete = member.offset_data + member.size <= size
        if suffix in IMAGES:
            width = height = 0
            if complete and (content := tar.extractfile(member)):
                with content:
                    width, height, _ = header_size(content)
            sample.image = _Image(member.offset_data, member.size, width, height, complete)
        elif complete and (content := tar.extractfile(member)):
            with content:
                data = content.read(TEXT_BYTES)
            if suffix == "txt":
                sample.text = captions_of_text(data, self._by_line)
            else:
                sample.record = captions_of_json(data, self._column, self._by_line)


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
