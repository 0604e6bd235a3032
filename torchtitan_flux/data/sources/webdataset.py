"""Tar shards as WebDataset writes them, read at random: each item by its offset in its shard."""

import json
import os
import re
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from torchtitan_flux.data.formats import formats
from torchtitan_flux.data.sources.index import IndexWriter, Row
from torchtitan_flux.data.sources.index_cache import open_index
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.listing import (
    HEAD,
    NOT_UTF8,
    foreign_content,
    matches,
    not_regular,
    stamp,
    walk,
)
from torchtitan_flux.data.sources.parts import not_read, own_parts, part_of
from torchtitan_flux.data.sources.source import SourceOptions, Split, UnreadableItem
from torchtitan_flux.data.sources.webdataset_scan import CUT, ShardScan
from torchtitan_flux.formatting import listed

OPEN_SHARDS = 64
"""Shards that one process keeps open."""

_COMPRESSED = re.compile(r"\.(tar\.(gz|zstd?|xz|bz2|lz4|z)|t(gz|zst|xz|bz2?))$", re.IGNORECASE)


class TarSource(IndexedSource):
    """The samples of local tar shards; ids are "<shard>/<key>", keys as in WebDataset.

    Shards come in the order of their names, or of the braces that spell them out; samples in the
    order in which a shard first names them. The second sample of a key that a shard repeats is
    "<shard>/<key>#2".

    Args:
        split: which part is read.
        options: path (a folder, a tar file or a pattern), image_column (the suffix of pictures, ""
            for any), caption_column (a key of the samples' .json; "" prefers their .txt),
            index_folder, what they say of captions and of pictures.

    Raises:
        OSError, ValueError: there are no shards, or no pictures in them, or they are something
            else.
    """

    name = "webdataset"

    def __init__(self, split: Split, options: SourceOptions):
        self.title = given = str(options.path)
        self.options = options
        self._refused: list[tuple[Path, OSError]] = []
        nameless = []
        if Path(given).is_dir():
            self.place, names = Path(given).absolute(), []
            for directory in walk(self.place, options.index_folder):
                names += directory.paths()
                nameless += [directory.name or given] * directory.unnameable
                if directory.error:
                    self._refused.append((self.place / directory.name, directory.error))
            names = [
                n for n in sorted(names) if n.lower().endswith(".tar") or _COMPRESSED.search(n)
            ]
            if not names:
                raise ValueError(f"{given} holds no .tar files")
        else:
            self.place, names = _files_of(given)
        parts = {name: part_of(name) for name in names}
        there = set(parts.values()) - {""}
        own = own_parts(there, split, given) if "train" in there and len(there) > 1 else None
        part, self.shared = own[0] if own else "", own is None
        self._left_out = not_read(parts, own) | ({NOT_UTF8: nameless} if nameless else {})
        self._shards: list[str] = []
        for name in (name for name in names if own is None or parts[name] == part):
            what = ""
            with suppress(OSError):  # told of when the shard is read
                what = not_regular(self.place / name)
            if what:
                self._left_out.setdefault(f"files left out, each is {what}", []).append(name)
            else:
                self._shards.append(name)
        if not self._shards:
            raise ValueError(f"{given}: {'; '.join(self._left_out)}")
        if compressed := [str(self.place / n) for n in self._shards if _COMPRESSED.search(n)]:
            raise ValueError(
                f"{listed(compressed, 3)}: compressed tar files cannot be read at random: unpack "
                "them to plain .tar, or move them out of the data"
            )
        # Relative, since folders are moved. A folder's own shards may change, a pattern may not.
        read_as = options.image_column, options.caption_column, options.captions_by_line
        self.identity = json.dumps([*read_as, part, os.path.relpath(given, self.place)])
        self._files = _ShardFiles([self.place / shard for shard in self._shards])
        super().__init__(self.name, given, open_index(self, options.index_folder), options)

    def facts(self, stored: Mapping[str, str]) -> dict[str, str]:
        return {
            **{shard: stamp(self.place / shard) for shard in self._shards},
            "what is left out": json.dumps(self._left_out),
            "what formats can be read": " ".join(formats()),
        }

    def build(self, writer: IndexWriter, bar: tqdm) -> None:
        self._refuse_what_is_no_tar()
        for text, names in self._left_out.items():
            writer.note(text, *names)
        for folder, error in self._refused:
            writer.refused(folder, error)
        sizes = [int(stamp(self.place / shard).split(":")[0] or 0) for shard in self._shards]
        bar.unit, bar.unit_scale, bar.total = "B", True, sum(sizes)
        scans = []
        for number, shard in enumerate(self._shards):
            scans.append(ShardScan(self.place, shard, number, self.options, writer))
            scans[-1].run(bar.update)
        self._note_losses(writer, scans)
        if not writer.rows:
            why = "".join(f"; {n.text}: {', '.join(n.examples)}" for n in writer.notes.values())
            raise ValueError(f"the {len(scans)} tar files of {self.title} hold no pictures{why}")

    def _refuse_what_is_no_tar(self) -> None:
        found = []
        for shard in self._shards:
            with suppress(OSError), (self.place / shard).open("rb") as file:  # told of later
                if (head := file.read(HEAD)) and (what := foreign_content(head)):
                    found.append(f"{self.place / shard} {what}")
        if found:
            raise ValueError(listed(found, 1) if len(found) > 1 else found[0])

    def _note_losses(self, writer: IndexWriter, scans: list[ShardScan]) -> None:
        """Note the shards that were not read to their end, and about how many samples that cost."""
        whole = [scan.samples for scan in scans if not scan.damage and not scan.refusal]
        usual = sum(whole) / len(whole) if whole else 0.0
        sample_bytes = sum(scan.end for scan in scans) / max(writer.rows, 1)
        for scan in scans:
            unread = scan.size - scan.end
            if unread >= tarfile.BLOCKSIZE and sample_bytes:
                lost = max(round(unread / sample_bytes), 1)
            elif scan.no_mark:
                lost = 0  # a writer that was not closed: every member is there
            else:
                lost = max(round(usual) - scan.samples, 1)
            if scan.refusal is not None:
                writer.refused(self.place / scan.shard, scan.refusal, scan.refused_at, lost)
            elif scan.damage:
                writer.note("damaged shards", f"{scan.shard}: {scan.damage}", lost=lost)

    def read(self, row: Row) -> bytes:
        data = self._files.read(row.shard, row.offset, row.length)
        if len(data) < row.length:
            raise UnreadableItem(row.item_id, CUT)
        return data


def _files_of(given: str) -> tuple[Path, list[str]]:
    """(folder, files in it) that a path or a pattern names."""
    files = [Path(given)] if Path(given).exists() else matches(given)
    if missing := [str(file) for file in files if not file.exists()]:
        remote = "; shards are read where they lie: download them" if "://" in given else ""
        raise ValueError(f"{listed(missing, 1)} does not exist{remote}")
    if not files:
        raise ValueError(f"no file matches {given}")
    files = [file.absolute() for file in files]
    place = Path(os.path.commonpath([file.parent for file in files]))
    return place, [file.relative_to(place).as_posix() for file in files]


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
