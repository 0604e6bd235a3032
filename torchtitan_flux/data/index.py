"""The file that an index is: one row for each item of a data set, read one row at a time.

An Arrow file of record batches, memory-mapped: what was not looked at takes no memory, and what was
is the kernel's to drop. What the rows were made from stands in the metadata of its schema.
"""

import json
import os
import secrets
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

BATCH_ROWS = 65_536
"""Rows that the writer keeps in memory; also what a reader may have to look through."""
BATCH_CHARACTERS = 2**27  # of captions: a batch of long ones is written earlier

FORMAT = "1"
"""Indexes of other formats are built anew."""
_KEY = b"torchtitan_flux.index"


class Row(NamedTuple):
    """What is known of an item without decoding it.

    Attributes:
        item_id: name of the item, unique within the data set.
        shard: which file of the data set holds the image; meaningless where each has its own.
        offset, length: where the file's bytes are the image's, in bytes.
        width, height: of the upright image in pixels; 0 when its header cannot be read.
        captions: canonical first; empty for an item that cannot be read.
        reason: why the item cannot be read, "" when nothing speaks against it.
    """

    item_id: str
    shard: int
    offset: int
    length: int
    width: int
    height: int
    captions: tuple[str, ...]
    reason: str


SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("reason", pa.string()),
    ]
)
assert tuple(SCHEMA.names) == Row._fields


class DamagedIndex(Exception):
    """The file is no index, or not the whole of one."""


class IndexWriter:
    """Writes an index from its first row to its last, a batch at a time.

    Args:
        path: file to write, over what is there.
        facts: what the rows are made from, for whoever asks whether that still holds.

    Attributes:
        rows: number of rows so far.
        reasons: how many of the rows added one by one cannot be read, by reason.
    """

    def __init__(self, path: Path, facts: Mapping[str, str]):
        self.rows = 0
        self.reasons: Counter[str] = Counter()
        self._rows: list[Row] = []
        self._characters = 0
        # The identity tells a worker process that it reads the very index its parent opened.
        stored = {"format": FORMAT, "identity": secrets.token_hex(8), "facts": dict(facts)}
        self._file = path.open("wb")
        schema = SCHEMA.with_metadata({_KEY: json.dumps(stored)})
        self._writer = pa.ipc.new_file(self._file, schema)

    def add(self, row: Row) -> None:
        """Append one row. Captions may hold what UTF-8 cannot encode; it becomes "?"."""
        row = row._replace(
            captions=tuple(text.encode("utf-8", "replace").decode() for text in row.captions)
        )
        self._rows.append(row)
        self._characters += sum(map(len, row.captions))
        self.rows += 1
        if row.reason:
            self.reasons[row.reason] += 1
        if len(self._rows) >= BATCH_ROWS or self._characters >= BATCH_CHARACTERS:
            self._flush()

    def add_columns(self, columns: Mapping[str, Sequence[Any] | pa.Array]) -> None:
        """Append many rows at once: for each field of `Row`, a column of equal length."""
        self._flush()
        arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
        table = pa.Table.from_arrays(arrays, names=SCHEMA.names)
        self._writer.write_table(table, max_chunksize=BATCH_ROWS)
        self.rows += len(table)

    def close(self) -> None:
        """Finish the file and see it through to the disk."""
        self._flush()
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Give up: what is written so far is no index."""
        self._file.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, names=SCHEMA.names))
        self._rows, self._characters = [], 0


class Index:
    """An index opened for reading; works after fork and can be pickled (it opens itself anew).

    Args:
        path: file that an `IndexWriter` has closed.

    Attributes:
        facts: what the rows were made from.
        identity: differs between any two indexes.

    Raises:
        DamagedIndex: the file is no index of this format.
        FileNotFoundError: there is none.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            # Threads of Arrow's would not live on in forked workers.
            options = pa.ipc.IpcReadOptions(use_threads=False)
            reader = pa.ipc.open_file(pa.memory_map(str(path)), options=options)
            stored = json.loads((reader.schema.metadata or {})[_KEY])
            if stored["format"] != FORMAT or not reader.schema.equals(SCHEMA):
                raise DamagedIndex(f"{path}: an index of another format")
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            self.facts: dict[str, str] = stored["facts"]
            self.identity: str = stored["identity"]
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedIndex(f"{path}: {error}") from error
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        """Row of item 0 <= index < len."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of an index of {len(self)}")
        number = bisect_right(self._ends, index)
        batch = self._batches[number]
        at = index - self._ends[number] + batch.num_rows
        row = Row._make(column[at].as_py() for column in batch.columns)
        return row._replace(captions=tuple(row.captions))

    def __reduce__(self):
        return _reopen, (self.path, self.identity)


def _reopen(path: Path, identity: str) -> Index:
    index = Index(path)
    if index.identity != identity:
        raise RuntimeError(
            f"{path} was built anew, from changed data, while this run reads it; start it again"
        )
    return index
