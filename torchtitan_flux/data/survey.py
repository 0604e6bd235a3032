"""What a data set holds, from its index alone: the table of every start and of inspect_data.py."""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from torchtitan_flux.data.sources.captions import NO_CAPTION
from torchtitan_flux.data.sources.index import EXAMPLES, Note
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.source import Source, UnreadableItem
from torchtitan_flux.data.sources.split import SourcePart, whole_of
from torchtitan_flux.latents import ImageSize

MIN_ITEMS = 100
"""Items over which a share is judged at least: one bad picture in a first batch of 8 is no 12 %."""

SAMPLED = 4096
"""Items whose captions are tokenised; of more, so many evenly spaced ones and the longest."""

REFUSED = "could not be opened when it was indexed"

RETRIED = 100
"""Items that the system refused when they were indexed, and that are tried again for the table."""


@runtime_checkable
class TokenCounter(Protocol):
    """`encoders.tokenizer.CaptionTokenizer`: tokens that each encoder takes, and a caption has."""

    limits: dict[str, int]

    def count(self, caption: str) -> tuple[int, ...]: ...


class Lengths(NamedTuple):
    """Tokens of the captions that were counted, for one encoder; `too_long`: share that is cut."""

    limit: int
    median: float
    longest: int
    too_long: float


@dataclass(frozen=True)
class Survey:
    """What is known of a data set without decoding a picture.

    Attributes:
        items: in the index, readable or not.
        held_out: how many of them are kept from training; None where there is no such part here.
        unreadable: why items cannot be read, the most frequent reason first; each item once.
        notes: what the index does not hold, and what is odd about what it does.
        enlarged: readable pictures that are smaller than the size of training.
        sizes: minimum, quartiles and maximum of (width, height) of readable pictures, in pixels.
        aspects: width / height rounded to a tenth -> pictures.
        tokens: of `counted` captions, by encoder.
    """

    title: str
    items: int
    held_out: int | None
    unreadable: list[Note] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    enlarged: list[Note] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    aspects: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, Lengths] = field(default_factory=dict)
    counted: int = 0

    def lines(self) -> Iterator[str]:
        """The table, a line each: a number, what it counts, examples."""
        held_out = "" if self.held_out is None else f", {self.held_out:,} of them held out"
        yield f"{self.title}: {self.items:,} items{held_out}"
        for one in self.unreadable:
            yield f"{one.count:11,}  cannot be read: {_with_examples(one)}"
        for note in self.notes:
            yield f"{note.count:11,}  {_with_examples(note)}"
        for one in self.enlarged:
            yield f"{one.count:11,}  {one.text}"
        for name, one in self.tokens.items():
            if one.too_long:
                yield (
                    f"{100 * one.too_long:9.1f} %  of captions are cut: {name} takes {one.limit} "
                    f"tokens, the longest has {one.longest}"
                )


def _with_examples(note: Note) -> str:
    lost = f" (about {note.lost:,} items lost)" if note.lost else ""
    named = ", ".join(note.examples) + (", …" if note.count > len(note.examples) else "")
    return note.text + lost + (f" ({named})" if note.examples else "")


class Tally:
    """Counts by text, with the first EXAMPLES names of each."""

    def __init__(self):
        self._notes: dict[str, Note] = {}

    def add(self, text: str, count: int, names: Iterable[str]) -> None:
        before = self._notes.get(text, Note(text, 0, 0, ()))
        examples = (*before.examples, *names)[:EXAMPLES]
        self._notes[text] = Note(text, before.count + count, 0, examples)

    def add_rows(self, text: str, rows: pa.RecordBatch, which: Bool[np.ndarray, " rows"]) -> None:
        first = np.flatnonzero(which)[:EXAMPLES]
        if len(first):
            names = rows["item_id"].take(pa.array(first)).to_pylist()
            self.add(text, int(which.sum()), names)

    def notes(self) -> list[Note]:
        """The most frequent first."""
        return sorted(self._notes.values(), key=lambda note: -note.count)


def survey(source: Source, size: ImageSize, tokens: TokenCounter | None = None) -> Survey:
    """Look a whole data set over, by its index and within seconds for millions of items.

    `source` is what a split reads, `size` that of training in pixels.
    """
    whole = whole_of(source)
    held_out = source.held_out if isinstance(source, SourcePart) else None
    if not isinstance(whole, IndexedSource):
        return Survey(whole.name, len(whole), held_out)
    unreadable, enlarged, refused, readable_sizes = Tally(), Tally(), [], []
    longest = (-1, 0)  # characters of the longest caption, and its row
    for start, rows, usable in _batches(whole):
        for text, which in _reasons(whole, rows, usable):
            if text:
                unreadable.add_rows(text, rows, which)
            else:
                refused += (start + np.flatnonzero(which)).tolist()
        width, height = (rows[name].to_numpy() for name in ("width", "height"))
        small = usable & ((width < size.width) | (height < size.height))
        enlarged.add_rows(f"pictures smaller than {size} are enlarged", rows, small)
        readable_sizes.append(np.stack([width[usable], height[usable]]))
        longest = max(longest, _longest_caption(start, rows), key=lambda found: found[0])
    for row in refused[:RETRIED]:
        try:
            whole[row]
        except UnreadableItem as error:
            unreadable.add(error.reason, 1, [error.item_id])
    if len(refused) > RETRIED:
        unreadable.add(REFUSED, len(refused) - RETRIED, [])
    sizes, aspects = _sizes(np.concatenate([np.zeros((2, 0), int), *readable_sizes], axis=1))
    lengths, counted = _token_lengths(whole, tokens, longest[1]) if tokens else ({}, 0)
    return Survey(
        whole.title, len(whole), held_out, unreadable.notes(), whole.index.notes,
        enlarged.notes(), sizes, aspects, lengths, counted,
    )  # fmt: skip


def unreadable_rows(source: IndexedSource) -> Iterator[str]:
    """Why each row cannot be read by what its index says; "" if readable."""
    for _, rows, usable in _batches(source):
        reasons = np.full(rows.num_rows, "", object)
        for text, which in _reasons(source, rows, usable):
            reasons[which] = text or REFUSED
        yield from reasons.tolist()


def _batches(
    source: IndexedSource,
) -> Iterator[tuple[int, pa.RecordBatch, Bool[np.ndarray, " rows"]]]:
    """(number of the first row, rows of the index, which of them are usable)."""
    start = 0
    for rows in source.index.batches():
        yield start, rows, source.usable_rows[start : start + rows.num_rows]
        start += rows.num_rows


def _reasons(
    source: IndexedSource, rows: pa.RecordBatch, usable: Bool[np.ndarray, " rows"]
) -> Iterator[tuple[str, Bool[np.ndarray, " rows"]]]:
    """(reason, rows it holds for), each row once; "" for what the system refused."""
    options, left = source.options, ~usable
    for text in pc.unique(rows["reason"].filter(pa.array(left))).to_pylist():
        if text and not (text == NO_CAPTION and options.default_caption is not None):
            which = left & pc.equal(rows["reason"], text).to_numpy(zero_copy_only=False)
            left = left & ~which
            yield text, which
    width, height = (rows[name].to_numpy().astype(np.int64) for name in ("width", "height"))
    small = left & (width > 0) & (np.minimum(width, height) < options.min_size)
    large = left & ~small & (width * height > options.max_pixels)
    yield f"too small, data.min_image_size = {options.min_size}", small
    yield f"decompression bomb, data.max_image_pixels = {options.max_pixels}", large
    yield "", left & ~small & ~large


def _longest_caption(start: int, rows: pa.RecordBatch) -> tuple[int, int]:
    """(characters, row) of the longest caption; `start` is the number of the first row."""
    characters = pc.binary_length(rows["captions"].flatten()).to_numpy(zero_copy_only=False)
    if not len(characters):
        return -1, start
    captions = pc.list_value_length(rows["captions"]).fill_null(0)
    ends = np.cumsum(captions.to_numpy(zero_copy_only=False))
    row = int(np.searchsorted(ends, int(characters.argmax()), side="right"))
    return int(characters.max()), start + row


def _token_lengths(
    source: IndexedSource, tokens: TokenCounter, longest: int
) -> tuple[dict[str, Lengths], int]:
    """(lengths by encoder, captions counted), of a sample and the row that is longest."""
    evenly = np.linspace(0, len(source) - 1, min(SAMPLED, len(source))).astype(np.int64)
    counts = [
        tokens.count(caption)
        for row in sorted({*evenly.tolist(), longest} if len(source) else ())
        for caption in source.captions(source.index[row])
    ]
    of_each = zip(tokens.limits.items(), np.array(counts).T, strict=True) if counts else ()
    return {
        name: Lengths(limit, float(np.median(n)), int(n.max()), float((n > limit).mean()))
        for (name, limit), n in of_each
    }, len(counts)


def _sizes(sizes: np.ndarray) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """(minimum, quartiles and maximum by pixels, aspect ratios) of sizes [2, n]."""
    widths, heights = sizes
    if not len(widths):
        return [], {}
    order = np.argsort(widths.astype(np.int64) * heights, kind="stable")
    at = order[np.linspace(0, len(order) - 1, 5).astype(np.int64)]
    ratios, counts = np.unique(np.round(widths / heights, 1), return_counts=True)
    aspects = {f"{ratio:.1f}": int(n) for ratio, n in zip(ratios, counts, strict=True)}
    return [(int(width), int(height)) for width, height in sizes[:, at].T], aspects


def refuse_unusable(source: Source, max_share: float, key: str) -> None:
    """Refuse data, named by TOML key `key`, of which nothing or too little can be trained on.

    Raises:
        ValueError: no item has a caption and a picture, or more than `max_share` of the items
            cannot be read or are lost with a damaged shard; says why, most frequent first.
    """
    whole = whole_of(source)
    if not isinstance(whole, IndexedSource):
        return
    items, lost = len(whole), sum(note.lost for note in whole.index.notes)
    readable = int(np.count_nonzero(whole.usable_rows))
    bad = items - readable + lost
    if readable and bad <= max_share * max(items + lost, MIN_ITEMS):
        return
    about = "about " if lost else ""
    what = (
        f"{about}{bad:,} of {about}{items + lost:,} items of {whole.title} cannot be read, more "
        f"than data.max_unreadable_share = {max_share}"
        if readable
        else f"{key}: none of the {items:,} items of {whole.title} can be trained on"
    )
    found = survey(source, ImageSize(1, 1))
    table = [f"{one.count:,} × {_with_examples(one)}" for one in (*found.unreadable, *found.notes)]
    raise ValueError(f"{what}: {'; '.join(table)}")
