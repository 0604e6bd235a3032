"""What a data set holds, from its index alone: the table of every start and of inspect_data.py."""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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

TRIED = 100
"""Items that the system refused when they were indexed, and that are tried again for the table."""


@runtime_checkable
class TokenCounter(Protocol):
    """Counts the tokens of captions (`encoders.tokenizer.CaptionTokenizer`).

    Attributes:
        limits: name of each encoder -> tokens that it takes.
    """

    limits: dict[str, int]

    def count(self, caption: str) -> tuple[int, ...]:
        """Tokens of the whole caption for each encoder, in the order of `limits`."""
        ...


@dataclass(frozen=True)
class Found:
    """How many items something holds for, and the first of them."""

    text: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Lengths:
    """Tokens of captions for one encoder.

    Attributes:
        limit: tokens that the encoder takes.
        median, longest: over the captions that were counted.
        too_long: share of them that is longer than the limit, whose end is cut off.
    """

    limit: int
    median: float
    longest: int
    too_long: float


@dataclass(frozen=True)
class Survey:
    """What is known of a data set without decoding a picture.

    Attributes:
        title: the data set, for people.
        items: in the index, readable or not.
        held_out: how many of them are kept from training; None where there is no such part here.
        unreadable: why items cannot be read, the most frequent reason first; each item once.
        notes: what the index does not hold, and what is odd about what it does.
        enlarged: readable pictures that are smaller than the size of training.
        sizes: minimum, quartiles and maximum of (width, height) of readable pictures, in pixels.
        aspects: width / height rounded to a tenth -> pictures.
        tokens: lengths of captions by encoder; empty without tokenizers.
        counted: captions whose tokens were counted.
    """

    title: str
    items: int
    held_out: int | None
    unreadable: list[Found]
    notes: list[Note]
    enlarged: Found
    sizes: list[tuple[int, int]]
    aspects: dict[str, int]
    tokens: dict[str, Lengths]
    counted: int

    @property
    def bad(self) -> int:
        """Items that cannot be read, those that are lost with their files included."""
        return sum(one.count for one in self.unreadable) + sum(note.lost for note in self.notes)

    def lines(self) -> Iterator[str]:
        """The table, a line each: a number, what it counts, examples."""
        held_out = "" if self.held_out is None else f", {self.held_out:,} of them held out"
        yield f"{self.title}: {self.items:,} items{held_out}"
        for one in self.unreadable:
            yield f"{one.count:11,}  cannot be read: {_with_examples(one)}"
        for note in self.notes:
            yield f"{note.count:11,}  {_with_examples(note)}"
        if self.enlarged.count:
            yield f"{self.enlarged.count:11,}  {self.enlarged.text}"
        for name, one in self.tokens.items():
            if one.too_long:
                yield (
                    f"{100 * one.too_long:9.1f} %  of captions are cut: {name} takes {one.limit} "
                    f"tokens, the longest has {one.longest}"
                )


def _with_examples(one: Found | Note) -> str:
    lost = f" (about {one.lost:,} items lost)" if isinstance(one, Note) and one.lost else ""
    named = ", ".join(one.examples) + (", …" if one.count > len(one.examples) else "")
    return one.text + lost + (f" ({named})" if one.examples else "")


def survey(source: Source, size: ImageSize, tokens: TokenCounter | None = None) -> Survey:
    """Look a data set over, by its index and within seconds for millions of items.

    Args:
        source: what a split reads; of a part, the whole data set is looked at.
        size: of training, in pixels.
        tokens: counts the tokens of captions; None leaves them out.
    """
    whole = whole_of(source)
    held_out = source.held_out if isinstance(source, SourcePart) else None
    if not isinstance(whole, IndexedSource):
        nothing = Found("", 0, ())
        return Survey(whole.name, len(whole), held_out, [], [], nothing, [], {}, {}, 0)
    reasons: dict[str, tuple[int, list[str]]] = {}
    widths, heights, enlarged, names = [], [], 0, []
    longest, at, refused = -1, 0, []
    for start, rows in _numbered(whole):
        usable = whole.usable_rows[start : start + rows.num_rows]
        for text, which in _why_not(whole, rows, usable):
            if not text:
                refused += (start + np.flatnonzero(which)).tolist()
                continue
            count, examples = reasons.get(text, (0, []))
            reasons[text] = count + int(which.sum()), examples + _ids(rows, which, examples)
        width, height = rows["width"].to_numpy()[usable], rows["height"].to_numpy()[usable]
        widths.append(width)
        heights.append(height)
        small = usable.copy()
        small[usable] = (width < size.width) | (height < size.height)
        enlarged += int(small.sum())
        names += _ids(rows, small, names)
        lengths = pc.list_value_length(rows["captions"])
        characters = pc.binary_length(rows["captions"].flatten()).to_numpy(zero_copy_only=False)
        if len(characters) and characters.max() > longest:
            longest = int(characters.max())
            ends = np.cumsum(lengths.fill_null(0).to_numpy(zero_copy_only=False))
            at = start + int(np.searchsorted(ends, int(characters.argmax()), side="right"))
    for text, count, examples in _tried_again(whole, refused):
        before, named = reasons.get(text, (0, []))
        reasons[text] = before + count, [*named, *examples][:EXAMPLES]
    found = [Found(text, count, tuple(names)) for text, (count, names) in reasons.items()]
    counted, tokens_of = 0, {}
    if tokens and len(whole):
        counted, tokens_of = _tokens(whole, tokens, at)
    sizes, aspects = _sizes(np.concatenate(widths or [[]]), np.concatenate(heights or [[]]))
    return Survey(
        whole.title,
        len(whole),
        held_out,
        sorted(found, key=lambda one: -one.count),
        whole.index.notes,
        Found(f"pictures smaller than {size} are enlarged", enlarged, tuple(names)),
        sizes,
        aspects,
        tokens_of,
        counted,
    )


def unreadable_rows(source: IndexedSource) -> Iterator[str]:
    """Why each row cannot be read by what its index says, "" when nothing speaks against it."""
    for start, rows in _numbered(source):
        usable = source.usable_rows[start : start + rows.num_rows]
        said = np.full(rows.num_rows, "", object)
        for text, which in _why_not(source, rows, usable):
            said[which] = text or REFUSED
        yield from said.tolist()


def _numbered(source: IndexedSource) -> Iterator[tuple[int, pa.RecordBatch]]:
    start = 0
    for rows in source.index.batches():
        yield start, rows
        start += rows.num_rows


def _ids(rows: pa.RecordBatch, which: Bool[np.ndarray, " rows"], so_far: list[str]) -> list[str]:
    """The first ids of these rows, as many as are missing to EXAMPLES."""
    first = np.flatnonzero(which)[: EXAMPLES - len(so_far)]
    return rows["item_id"].take(pa.array(first)).to_pylist()


def _why_not(
    source: IndexedSource, rows: pa.RecordBatch, usable: Bool[np.ndarray, " rows"]
) -> Iterator[tuple[str, Bool[np.ndarray, " rows"]]]:
    """(reason, rows it holds for), each row once; "" for what the system refused."""
    if usable.all():
        return
    options = source.options
    width, height = (rows[name].to_numpy().astype(np.int64) for name in ("width", "height"))
    left = ~usable
    for text in pc.unique(rows["reason"].filter(pa.array(left))).to_pylist():
        if text and not (text == NO_CAPTION and options.default_caption is not None):
            which = left & pc.equal(rows["reason"], text).to_numpy(zero_copy_only=False)
            left = left & ~which
            yield text, which
    small = left & (width > 0) & (np.minimum(width, height) < options.min_size)
    if small.any():
        yield f"too small, data.min_image_size = {options.min_size}", small
    large = left & ~small & (width * height > options.max_pixels)
    if large.any():
        yield f"decompression bomb, data.max_image_pixels = {options.max_pixels}", large
    left = left & ~small & ~large
    if left.any():
        yield "", left


def _tried_again(source: IndexedSource, rows: list[int]) -> Iterator[tuple[str, int, list[str]]]:
    """Why items cannot be read that the system refused when they were indexed."""
    for row in rows[:TRIED]:
        try:
            source[row]
        except UnreadableItem as error:
            yield error.reason, 1, [error.item_id]
    if len(rows) > TRIED:
        yield REFUSED, len(rows) - TRIED, []


def _tokens(source: IndexedSource, tokens: TokenCounter, longest: int) -> tuple[int, dict]:
    """(captions counted, their lengths by encoder), of a sample and the row that is longest."""
    evenly = np.linspace(0, len(source) - 1, min(SAMPLED, len(source))).astype(np.int64)
    counts = [
        tokens.count(caption)
        for row in sorted({*evenly.tolist(), longest})
        for caption in source.captions(source.index[row])
    ]
    if not counts:
        return 0, {}
    return len(counts), {
        name: Lengths(limit, float(np.median(n)), int(n.max()), float((n > limit).mean()))
        for (name, limit), n in zip(tokens.limits.items(), np.array(counts).T, strict=True)
    }


def _sizes(widths: np.ndarray, heights: np.ndarray) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """(minimum, quartiles and maximum of sizes by their pixels, aspect ratios)."""
    if not len(widths):
        return [], {}
    order = np.argsort(widths.astype(np.int64) * heights, kind="stable")
    at = order[np.linspace(0, len(order) - 1, 5).astype(np.int64)]
    ratios, counts = np.unique(np.round(widths / heights, 1), return_counts=True)
    return (
        [(int(width), int(height)) for width, height in zip(widths[at], heights[at], strict=True)],
        {f"{ratio:.1f}": int(n) for ratio, n in zip(ratios, counts, strict=True)},
    )


def refuse_unusable(source: Source, max_share: float, key: str) -> None:
    """Refuse data that nobody can train on, or of which too much is known to be lost.

    Args:
        source: what a split reads; of a part, the whole data set is looked at.
        max_share: `data.max_unreadable_share`.
        key: the TOML key that names the data.

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
