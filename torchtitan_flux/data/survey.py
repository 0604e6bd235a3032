"""What a data set holds, from its index alone: the table of every start and of inspect_data.py."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from torchtitan_flux.data.sources.captions import NO_CAPTION
from torchtitan_flux.data.sources.index import EXAMPLES, SCHEMA, Note, Row
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.source import Source
from torchtitan_flux.data.sources.split import SourcePart, whole_of
from torchtitan_flux.latents import ImageSize

MIN_ITEMS = 100
"""Items over which a share is judged at least: one bad picture in a first batch of 8 is no 12 %."""

SAMPLED = 4096
"""Items whose captions are tokenised, evenly spaced."""

REFUSED = "could not be opened when it was indexed"


class Survey(NamedTuple):
    """What is known of a data set without decoding a picture.

    Attributes:
        items: in the index, readable or not.
        held_out: how many of them are kept from training; None where there is no such part here.
        unreadable: why items cannot be read, the most frequent reason first; each item once.
        notes: what else there is, and what is odd about it.
    """

    title: str
    items: int
    held_out: int | None
    unreadable: Sequence[Note] = ()
    notes: Sequence[Note] = ()

    def lines(self) -> Iterator[str]:
        """The table, a line each: a number, what it counts, examples."""
        held_out = "" if self.held_out is None else f", {self.held_out:,} of them held out"
        yield f"{self.title}: {self.items:,} items{held_out}"
        for note in self.unreadable:
            yield f"{note.count:11,}  cannot be read: {_with_examples(note)}"
        for note in self.notes:
            yield f"{note.count:11,}  {_with_examples(note)}"


def _with_examples(note: Note) -> str:
    named = ", ".join(note.examples) + (", …" if note.count > len(note.examples) else "")
    return note.text + (f" ({named})" if note.examples else "")


def survey(source: Source, size: ImageSize, cut: Callable | None = None) -> Survey:
    """Look a whole data set over, by its index and within seconds for millions of items.

    Args:
        source: or a part of it; both parts of one say the same.
        size: that pictures are trained at, in pixels.
        cut: `CaptionTokenizer.cut`.
    """
    whole = whole_of(source)
    held_out = source.held_out if isinstance(source, SourcePart) else None
    if not isinstance(whole, IndexedSource):
        return Survey(whole.name, len(whole), held_out)
    usable, index = whole.usable_rows, whole.index
    notes = list(index.notes)
    table = pa.Table.from_batches(index.batches, SCHEMA)
    width, height = (table[name].to_numpy().astype(np.int64) for name in ("width", "height"))
    if usable.any():
        at = np.flatnonzero(usable)[np.argsort((width * height)[usable], kind="stable")]
        least, most = (f"{width[row]}x{height[row]}" for row in (at[0], at[-1]))
        notes.append(Note(f"pictures from {least} to {most} pixels", len(at), ()))
    small = np.flatnonzero(usable & ((width < size.width) | (height < size.height))).tolist()
    if small:
        names = tuple(index[row].item_id for row in small[:EXAMPLES])
        notes.append(Note(f"pictures smaller than {size} are enlarged", len(small), names))
    if cut:
        notes += _cut_captions(whole, cut)
    bad = (index[row] for row in np.flatnonzero(~usable).tolist())
    reasons = ((why_unreadable(whole, row), row.item_id) for row in bad)
    return Survey(whole.title, len(whole), held_out, by_reason(reasons), notes)


def why_unreadable(source: IndexedSource, row: Row) -> str:
    """What the index says against a row; "" where it can be read."""
    options, captions = source.options, source.captions(row)
    if row.reason and not (captions and row.reason == NO_CAPTION):
        return row.reason
    if 0 < min(row.width, row.height) < options.min_size:
        return f"too small, data.min_image_size = {options.min_size}"
    if row.width * row.height > options.max_pixels:
        return f"decompression bomb, data.max_image_pixels = {options.max_pixels}"
    return "" if captions and row.width else REFUSED


def by_reason(unreadable: Iterable[tuple[str, str]]) -> list[Note]:
    """Counts of (reason, item), most frequent first; reasons that differ in numbers are one."""
    found: dict[str, list[tuple[str, str]]] = {}
    for one in unreadable:
        found.setdefault(re.sub(r"\d+", "", one[0]), []).append(one)
    return [
        Note(same[0][0], len(same), tuple(item for _, item in same[:EXAMPLES]))
        for same in sorted(found.values(), key=len, reverse=True)
    ]


def _cut_captions(source: IndexedSource, cut: Callable) -> Iterator[Note]:
    rows = [source.index[row] for row in range(0, len(source), 1 + len(source) // SAMPLED)]
    captions = [caption for row in rows for caption in source.captions(row)]
    counts = Counter(encoder for caption in captions for encoder in cut(caption))
    for encoder, count in counts.items():
        yield Note(f"captions of {len(captions):,} looked at are cut by {encoder}", count, ())


def refuse_unusable(source: Source, max_share: float, key: str) -> None:
    """Refuse data, named by TOML key `key`, of which nothing or too little can be trained on.

    Raises:
        ValueError: no item has a caption and a picture, or more than `max_share` of the items
            cannot be read; says why, most frequent first.
    """
    whole = whole_of(source)
    if not isinstance(whole, IndexedSource):
        return
    items, readable = len(whole), int(np.count_nonzero(whole.usable_rows))
    bad = items - readable
    if readable and bad <= max_share * max(items, MIN_ITEMS):
        return
    what = (
        f"{bad:,} of {items:,} items of {whole.title} cannot be read, more than "
        f"data.max_unreadable_share = {max_share}"
        if readable
        else f"{key}: none of the {items:,} items of {whole.title} can be trained on"
    )
    found, notes = survey(source, ImageSize(1, 1)).unreadable, whole.index.notes
    table = [f"{one.count:,} × {_with_examples(one)}" for one in (*found, *notes)]
    raise ValueError(f"{what}: {'; '.join(table)}")
