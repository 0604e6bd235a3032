"""The file that an index is: one row for each item of a data set, read one row at a time.

A memory-mapped Arrow file of record batches. What the rows were made from stands in the metadata
of its schema; what is known only at the end (notes, the digest of the item ids) in that of a last
batch without rows.
"""

import json
import secrets
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import xxhash

BATCH_ROWS = 16_384
"""Rows that the writer keeps in memory."""
EXAMPLES = 5
"""Names that a note keeps."""

_FORMAT = "5"  # indexes of other formats are built anew
_KEY = b"torchtitan_flux.index"


class Row(NamedTuple):
    """What is known of an item without decoding it.

    Attributes:
        item_id: unique within the data set.
        shard, offset, length: which of the data's files holds the image, and where, in bytes.
        width, height: of the upright image in pixels; 0 when its header cannot be read.
        captions: canonical first; empty where there are none.
        reason: why there are no captions, or what is wrong with the image by its header; "" also
            where the operating system refused, which can be over tomorrow.
    """

    item_id: str
    shard: int
    offset: int
    length: int
    width: int
    height: int
    captions: tuple[str, ...]
    reason: str


_PLACE = (pa.int32(), pa.int64(), pa.int64(), pa.int32(), pa.int32())
_TYPES = (pa.string(), *_PLACE, pa.list_(pa.string()), pa.string())
SCHEMA = pa.schema(list(zip(Row._fields, _TYPES, strict=True)))


class Note(NamedTuple):
    """What was met while an index was built and its rows do not show."""

    text: str  # in the plural, to be read after a number
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    examples: tuple[str, ...]  # the first names


class IndexWriter:
    """Writes an index, a batch at a time, within `with`; `facts` are what its rows depend on."""

    def __init__(self, path: Path, facts: Mapping[str, str]):
        self.rows = 0
        self.notes: dict[str, Note] = {}
        self._digest = xxhash.xxh3_128()
        self._rows: list[Row] = []
        # By the identity, a worker process knows the very index that its parent opened.
        stored = {"format": _FORMAT, "identity": secrets.token_hex(8), "facts": dict(facts)}
        self._file = path.open("wb")
        schema = SCHEMA.with_metadata({_KEY: json.dumps(stored)})
        self._writer = pa.ipc.new_file(self._file, schema)

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._flush()
            notes, digest = list(self.notes.values()), self._digest.hexdigest()
            empty = pa.RecordBatch.from_pylist([], SCHEMA)
            last = json.dumps({"notes": notes, "digest": digest})
            self._writer.write_batch(empty, custom_metadata={_KEY: last})
            self._writer.close()
        self._file.close()

    def add(self, row: Row) -> None:
        """Append one row. Captions may hold what UTF-8 cannot encode; it becomes "?"."""
        captions = tuple(text.encode("utf-8", "replace").decode() for text in row.captions)
        self._rows.append(row._replace(captions=captions))
        self.rows += 1
        if len(self._rows) >= BATCH_ROWS:
            self._flush()

    def note(self, text: str, *examples: str) -> None:
        """Count names of something that the rows do not show; notes of one text are one `Note`."""
        for example in examples:
            _, count, names = self.notes.get(text, Note(text, 0, ()))
            names = (*names, example.encode("utf-8", "replace").decode())[:EXAMPLES]
            self.notes[text] = Note(text, count + 1, names)

    def noted(self) -> str:
        """The notes in one line."""
        said = (f"{note.text}: {', '.join(note.examples)}" for note in self.notes.values())
        return "; ".join(said)

    def _flush(self) -> None:
        if self._rows:
            columns = zip(zip(*self._rows, strict=True), _TYPES, strict=True)
            arrays = [pa.array(values, of) for values, of in columns]
            self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
            self._digest.update("".join(f"{row.item_id}\0" for row in self._rows).encode())
            self._rows = []


class Index:
    """An index opened for reading; works after fork and can be pickled (it opens itself anew).

    `identity` differs between any two indexes, `digest` where item ids or their order do; `batches`
    are the rows. A file that is no whole index raises what Arrow or json do, or KeyError.
    """

    def __init__(self, path: Path):
        self.path = path
        # Threads of Arrow's would not live on in forked workers.
        options = pa.ipc.IpcReadOptions(use_threads=False)
        reader = pa.ipc.open_file(pa.memory_map(str(path)), options=options)
        stored = json.loads((reader.schema.metadata or {})[_KEY])
        if stored["format"] != _FORMAT or not reader.schema.equals(SCHEMA):
            raise ValueError("an index of another format")
        numbers = range(reader.num_record_batches)
        *batches, (_, last) = map(reader.get_batch_with_custom_metadata, numbers)
        found = json.loads(last[_KEY])
        self.batches: list[pa.RecordBatch] = [batch for batch, _ in batches]
        self._ends = list(accumulate(batch.num_rows for batch in self.batches))
        self.facts: dict[str, str] = stored["facts"]
        self.identity: str = stored["identity"]
        self.notes = [Note(text, count, tuple(names)) for text, count, names in found["notes"]]
        self.digest: str = found["digest"]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of an index of {len(self)}")
        number = bisect_right(self._ends, index)
        at = index - self._ends[number]  # from the end of its batch
        row = Row._make(column[at].as_py() for column in self.batches[number].columns)
        return row._replace(captions=tuple(row.captions))

    def __reduce__(self):
        return _reopen, (self.path, self.identity)


def _reopen(path: Path, identity: str) -> Index:
    index = Index(path)
    if index.identity != identity:
        raise RuntimeError(f"{path} was built anew while this run reads it; start it again")
    return index
