"""What an index of many rows costs to write, to open and to read at random.

    python benchmarks/index_rows.py

writes ten million synthetic rows (`--rows`) into a temporary folder (`--folder` keeps them), opens
them in a fresh process, reads 10,000 at random positions of a run and makes the table that every
start prints. It prints seconds, rows per second, and by how much the memory that belongs to the
process alone (RssAnon) has grown.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchtitan_flux.data.sources.index import Index, Row

READS = 10_000
WRITTEN_AT_ONCE = 2**18

WORDS = "red green blue large small round square circle star above below beside the".split()  # noqa: SIM905


def rows_of(start: int, count: int) -> "Iterator[Row]":
    """Rows as a webdataset of 10,000 samples a shard has them, captions of about 60 characters."""
    from torchtitan_flux.data.sources.index import Row

    rng = np.random.default_rng(start)
    sentences = [" ".join(rng.choice(WORDS, 13)) for _ in range(997)]
    lengths = rng.integers(20_000, 50_000, count).tolist()
    sizes = rng.integers(200, 1000, (count, 2)).tolist()
    for n, length, (width, height) in zip(range(start, start + count), lengths, sizes, strict=True):
        shard, within = divmod(n, 10_000)
        item_id, captions = f"{shard:05d}.tar/{n:09d}", (f"{sentences[n % 997]} {n}",)
        yield Row(item_id, shard, within * 50_000, length, width, height, captions, "")


def write(path: Path, rows: int) -> None:
    from torchtitan_flux.data.sources.index import IndexWriter

    start = time.perf_counter()
    with IndexWriter(path, {}) as writer:
        for first in range(0, rows, WRITTEN_AT_ONCE):
            for row in rows_of(first, min(WRITTEN_AT_ONCE, rows - first)):
                writer.add(row)
    seconds = time.perf_counter() - start
    size = path.stat().st_size / 1e6
    print(f"written: {rows} rows, {size:.0f} MB, {seconds:.1f} s, {rows / seconds:.0f} rows/s")


def private_memory() -> float:
    """RssAnon of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/self/status has no RssAnon: this is no Linux")


def read(path: Path) -> None:
    """Open and read; to be called in a fresh process."""

    from torchtitan_flux.data.order import Order
    from torchtitan_flux.data.sources.index import Index

    before = private_memory()
    start = time.perf_counter()
    index = Index(path)
    print(f"opened: {len(index)} rows, {time.perf_counter() - start:.3f} s")
    print(f"RssAnon grown after opening: {private_memory() - before:.1f} MB")

    order = Order(0, len(index))
    start = time.perf_counter()
    characters = 0
    for position in range(READS):
        number = order.item(position)
        row = index[number]
        assert row.item_id.endswith(f"/{number:09d}"), (number, row)
        characters += len(row.captions[0])
    seconds = time.perf_counter() - start
    print(f"read: {READS / seconds:.0f} rows/s, captions of {characters / READS:.0f} characters")
    print(f"RssAnon grown after reading: {private_memory() - before:.1f} MB")
    table(index)


def table(index: "Index") -> None:
    """The table that every start prints, and a held-out part; many rows are too small."""
    from torchtitan_flux.data.sources.indexed import IndexedSource
    from torchtitan_flux.data.sources.source import SourceOptions
    from torchtitan_flux.data.sources.split import SourcePart
    from torchtitan_flux.data.survey import survey
    from torchtitan_flux.latents import ImageSize

    class Rows(IndexedSource):
        def read(self, row):
            raise FileNotFoundError

    source = Rows("rows", "rows", index, SourceOptions(min_size=300))
    start = time.perf_counter()
    part = SourcePart(source, "held_out", 0.01)
    print(f"held out: {len(part)} rows, {time.perf_counter() - start:.2f} s")
    start = time.perf_counter()
    found = survey(source, ImageSize(512, 512))
    bad = sum(one.count for one in found.unreadable)
    print(f"table: {bad} cannot be read, {time.perf_counter() - start:.2f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure an index of many rows.")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where to write, and to keep, the index")
    parser.add_argument("--read", type=Path, help="only read this index")
    args = parser.parse_args()
    if args.read:
        read(args.read)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        path = (args.folder or Path(temporary)) / "rows.arrow"
        write(path, args.rows)
        sys.stdout.flush()
        return subprocess.run([sys.executable, __file__, "--read", path], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
