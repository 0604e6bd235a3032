"""Tar shards as WebDataset writes them, read at random: each item by its offset in its shard."""

import json
import os
import re
import tarfile
from collections import defaultdict
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from torchtitan_flux.data.decode import header_size
from torchtitan_flux.data.formats import is_picture
from torchtitan_flux.data.sources import listing
from torchtitan_flux.data.sources.captions import Captions, captions_of_file, first_of
from torchtitan_flux.data.sources.index import IndexWriter, Row
from torchtitan_flux.data.sources.indexed import IndexedSource, open_index
from torchtitan_flux.data.sources.source import SourceOptions, Split, UnreadableItem
from torchtitan_flux.data.sources.split import part_of, split_files
from torchtitan_flux.formatting import listed

CUT = "lies beyond the end of its shard"
UNCLEAR = "its key has several pictures or texts in the shard, and which belong together is unknown"

DAMAGED = "damaged shards, read up to the damage"
DOTTED = "members with a further dot in their names, where the key ends at the first"
ODD = "members that are links or sparse files, or whose names are not UTF-8"
ALONE = "samples without a picture"

_COMPRESSED = re.compile(r"\.(tar\.(gz|zstd?|xz|bz2|lz4|z)|t(gz|zst|xz|bz2?))$", re.IGNORECASE)
_TEXT_BYTES = 2**24  # a longer .txt or .json is not a caption
_PADDING = 2**20  # zeros that tar programs may write behind the end, in bytes
_TEXTS = ("txt", "json", "caption")


class TarSource(IndexedSource):
    """The samples of local tar shards; ids are "<shard>/<key>".

    Shards come in the order of their names, or of the braces that spell them out; samples in the
    order in which a shard first names them. `image_column` is the suffix of pictures, "" for any;
    `caption_column` a key of the samples' .json, "" prefers their .txt.
    """

    name = "webdataset"

    def __init__(self, split: Split, options: SourceOptions):
        self.title = path = str(options.path)
        self.options = options
        self.place, names, left_out = _shards(path, options.index_folder)
        parts = {name: part_of(name) for name in names}
        part, self.shared, self._shards, others = split_files(parts, split, path, both=True)
        self.left_out = others | {listing.LEFT_OUT: left_out}
        if compressed := [str(self.place / n) for n in self._shards if _COMPRESSED.search(n)]:
            raise ValueError(
                f"{listed(compressed, 3)}: compressed tar files cannot be read at random: unpack "
                "them to plain .tar, or move them out of the data"
            )
        # Relative, since folders are moved. A folder's own shards may change, a pattern may not.
        read_as = options.image_column, options.caption_column, options.captions_by_line
        self.identity = json.dumps([*read_as, part, os.path.relpath(path, self.place)])
        super().__init__(self.name, path, open_index(self, options.index_folder), options)

    def facts(self) -> dict[str, str]:
        return {shard: listing.stamp(self.place / shard) for shard in self._shards}

    def build(self, writer: IndexWriter, bar: tqdm) -> None:
        for path in (self.place / shard for shard in self._shards):
            with path.open("rb") as file:
                if what := listing.foreign_content(file.read(listing.HEAD)):
                    raise ValueError(f"{path} {what}")
        sizes = [os.path.getsize(self.place / shard) for shard in self._shards]
        bar.unit, bar.unit_scale, bar.total = "B", True, sum(sizes)
        for number, shard in enumerate(self._shards):
            with (self.place / shard).open("rb") as file:
                _Shard(shard, number, self.options, writer, bar).index(file)
        if not writer.rows:
            empty = f"the {len(sizes)} tar files of {self.title} hold no pictures"
            raise ValueError(f"{empty}; {writer.noted()}")

    def read(self, row: Row) -> bytes:
        with (self.place / self._shards[row.shard]).open("rb") as file:
            file.seek(row.offset)
            data = file.read(row.length)
        if len(data) < row.length:
            raise UnreadableItem(row.item_id, CUT)
        return data


def _shards(given: str, without: Path | None) -> tuple[Path, list[str], list[str]]:
    """(folder, files in it that a path or a pattern names, what is left out of it)."""
    path = Path(given)
    if path.is_dir():
        files, left_out = listing.files_below(path.absolute(), without)
        names = [n for n in files if n.lower().endswith(".tar") or _COMPRESSED.search(n)]
        if not names:
            raise ValueError(f"{given} holds no .tar files")
        return path.absolute(), sorted(names), left_out
    found = [path]
    if not path.exists():  # a pattern; what braces spell out has to exist
        names = listing.expand_braces(given)
        globbed = [sorted(glob(name)) if has_magic(name) else [name] for name in names]
        found = [Path(name) for name in dict.fromkeys(chain.from_iterable(globbed))]
    if missing := next((file for file in found if not file.is_file()), None):
        remote = "; shards are read where they lie: download them" if "://" in given else ""
        raise ValueError(f"{missing} {listing.missing(missing)}{remote}")
    if not found:
        raise ValueError(f"no file matches {given}")
    found = [file.absolute() for file in found]
    place = Path(os.path.commonpath([file.parent for file in found]))
    return place, [file.relative_to(place).as_posix() for file in found], []


class _Shard:
    """Goes through one shard, header by header, and writes what it holds into an index."""

    def __init__(
        self, name: str, number: int, options: SourceOptions, writer: IndexWriter, bar: tqdm
    ):
        self.name, self.number, self.options = name, number, options
        self.writer, self.bar = writer, bar
        self.named = options.image_column.lower().removeprefix(".")
        # Of each key, in the order in which they come.
        self.pictures: dict[str, list[Row]] = {}
        self.texts: defaultdict[str, list[tuple[str, Captions]]] = defaultdict(list)

    def index(self, file: BinaryIO) -> None:
        try:
            self._read(file, os.fstat(file.fileno()).st_size)
        except OSError:
            raise
        except Exception as error:
            # tarfile meets garbage in headers as ValueError, KeyError, OverflowError, …
            self.writer.note(DAMAGED, f"{self.name}: {type(error).__name__}: {error}")
        for key, pictures in self.pictures.items():
            texts = dict(self.texts[key])
            if not pictures:
                self.writer.note(ALONE, f"{self.name}/{key}")
            elif len(pictures) > 1 or len(texts) < len(self.texts[key]):
                self.writer.add(pictures[0]._replace(reason=UNCLEAR))
            else:
                order = sorted(_TEXTS, key=lambda kind: kind != "json")
                order = order if self.options.caption_column else _TEXTS
                captions, why = first_of(texts[kind] for kind in order if kind in texts)
                reason = pictures[0].reason or why
                self.writer.add(pictures[0]._replace(captions=captions, reason=reason))

    def _read(self, file: BinaryIO, size: int) -> None:
        end = 0
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # pyright: ignore  (else it would keep all of them)
                if tar.offset <= end:  # would go round in circles
                    raise tarfile.ReadError(f"negative size at byte {member.offset}")
                self.bar.update(min(tar.offset, size) - end)
                end = tar.offset
                self._add(tar, member, size)
        # tarfile takes what is no header for the end, where zeros have to be, and looks no further.
        file.seek(end)
        mark = file.read(tarfile.BLOCKSIZE)
        if len(mark) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without the mark that ends a tar file")
        if any(mark):
            raise tarfile.ReadError(f"no tar header at byte {end}")
        if any(file.read(_PADDING)) or file.tell() < size:
            raise tarfile.ReadError(f"{size - end} bytes follow the end of the tar, at byte {end}")

    def _add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, size: int) -> None:
        folder, _, file = member.name.rpartition("/")
        stem, dot, suffix = file.partition(".")
        suffix = suffix.lower()
        key = os.path.join(folder, stem).removeprefix("./")
        pictured = suffix == self.named if self.named else is_picture(file)
        if not (stem and dot) or member.isdir():
            return
        if "." in suffix and suffix != self.named:
            if is_picture(file) or suffix.endswith(_TEXTS):
                self.writer.note(DOTTED, f"{self.name}/{file}")
        elif not (pictured or suffix in _TEXTS):
            return
        elif not member.isfile() or member.issparse() or not listing.is_unicode(member.name):
            self.writer.note(ODD, f"{self.name}/{member.name}")
        else:
            pictures = self.pictures.setdefault(key, [])
            at, length = member.offset_data, member.size
            content = tar.extractfile(member) if at + length <= size else None
            if pictured:
                width, height, wrong = header_size(content) if content else (0, 0, CUT)
                item_id = f"{self.name}/{key}"
                pictures.append(Row(item_id, self.number, at, length, width, height, (), wrong))
            elif content:
                column, by_line = self.options.caption_column, self.options.captions_by_line
                text = captions_of_file(content.read(_TEXT_BYTES), f".{suffix}", column, by_line)
                self.texts[key].append((suffix, text))
