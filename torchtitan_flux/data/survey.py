"""What a data set holds, from its index alone: the table of every start and of inspect_data.py."""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int, Int64

from torchtitan_flux.data.sources.captions import NO_CAPTION
from torchtitan_flux.data.sources.index import EXAMPLES, SCHEMA, Note
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
    named = ", ".join(note.examples) + (", …" if note.count > len(note.examples) else "")
    return note.text + (f" ({named})" if note.examples else "")


def survey(source: Source, size: ImageSize, tokens: TokenCounter | None = None) -> Survey:
    """Look a whole data set over, by its index and within seconds for millions of items.

    `source` is what a split reads, `size` that of training in pixels.
    """
    whole = whole_of(source)
    held_out = source.held_out if isinstance(source, SourcePart) else None
    if not isinstance(whole, IndexedSource):
        return Survey(whole.name, len(whole), held_out)
    reasons, of_row = unreadable_rows(whole)
    for row in np.flatnonzero(of_row == reasons.index(REFUSED))[:RETRIED].tolist():
        try:
            whole[row]
            of_row[row] = 0
        except UnreadableItem as error:
            reasons = reasons if error.reason in reasons else [*reasons, error.reason]
            of_row[row] = reasons.index(error.reason)
    notes = [_note(whole, text, of_row == number) for number, text in enumerate(reasons) if number]
    usable, (width, height) = whole.usable_rows, _sizes(whole)
    small = usable & ((width < size.width) | (height < size.height))
    enlarged = _note(whole, f"pictures smaller than {size} are enlarged", small)
    lengths, counted = _token_lengths(whole, tokens) if tokens else ({}, 0)
    return Survey(
        whole.title,
        len(whole),
        held_out,
        sorted((note for note in notes if note.count), key=lambda note: -note.count),
        whole.index.notes,
        [enlarged] if enlarged.count else [],
        *_summary(width[usable], height[usable]),
        lengths,
        counted,
    )


def unreadable_rows(source: IndexedSource) -> tuple[list[str], Int[np.ndarray, " rows"]]:
    """(reasons, number of the reason why a row cannot be read by what its index says).

    Number 0 is "", of readable rows; REFUSED is of those that the system refused.
    """
    options, (width, height) = source.options, _sizes(source)
    encoded = _table(source)["reason"].dictionary_encode().combine_chunks()
    texts, number = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    reasons = [
        "",
        f"too small, data.min_image_size = {options.min_size}",
        f"decompression bomb, data.max_image_pixels = {options.max_pixels}",
        REFUSED,
        *texts,
    ]
    defaulted = NO_CAPTION if options.default_caption is not None else ""
    is_reason = np.array([text not in ("", defaulted) for text in texts], bool)
    small = (width > 0) & (np.minimum(width, height) < options.min_size)
    large = width * height > options.max_pixels
    cases = [source.usable_rows, is_reason[number], small, large]
    return reasons, np.select(cases, [0, 4 + number, 1, 2], 3)


def _table(source: IndexedSource) -> pa.Table:
    return pa.Table.from_batches(source.index.batches, SCHEMA)


def _sizes(source: IndexedSource) -> Int64[np.ndarray, "2 rows"]:
    """Width and height of all rows."""
    table = _table(source)
    return np.stack([table[name].to_numpy() for name in ("width", "height")]).astype(np.int64)


def _note(source: IndexedSource, text: str, which: Bool[np.ndarray, " rows"]) -> Note:
    """How many rows, and the first of them by name."""
    first = np.flatnonzero(which)[:EXAMPLES].tolist()
    names = tuple(source.index[row].item_id for row in first)
    return Note(text, int(which.sum()), names)


def _token_lengths(source: IndexedSource, tokens: TokenCounter) -> tuple[dict[str, Lengths], int]:
    """(lengths by encoder, captions counted), of a sample and the row with the longest caption."""
    rows = np.linspace(0, len(source) - 1, min(SAMPLED, len(source))).astype(np.int64)
    captions = _table(source)["captions"]
    characters = pc.binary_length(pc.list_flatten(captions)).to_numpy()
    if len(characters):
        longest = pc.list_parent_indices(captions)[int(characters.argmax())].as_py()
        rows = np.union1d(rows, longest)
    counts = [
        tokens.count(caption)
        for row in rows.tolist()
        for caption in source.captions(source.index[row])
    ]
    of_each = zip(tokens.limits.items(), np.array(counts).T, strict=True) if counts else ()
    return {
        name: Lengths(limit, float(np.median(n)), int(n.max()), float((n > limit).mean()))
        for (name, limit), n in of_each
    }, len(counts)


def _summary(
    widths: Int64[np.ndarray, " n"], heights: Int64[np.ndarray, " n"]
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """(minimum, quartiles and maximum by pixels, aspect ratios)."""
    if not len(widths):
        return [], {}
    order = np.argsort(widths * heights, kind="stable")
    at = order[np.linspace(0, len(order) - 1, 5).astype(np.int64)]
    ratios, counts = np.unique(np.round(widths / heights, 1), return_counts=True)
    aspects = {f"{ratio:.1f}": int(n) for ratio, n in zip(ratios, counts, strict=True)}
    return list(zip(widths[at].tolist(), heights[at].tolist(), strict=True)), aspects


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
    found = survey(source, ImageSize(1, 1))
    table = [f"{one.count:,} × {_with_examples(one)}" for one in (*found.unreadable, *found.notes)]
    raise ValueError(f"{what}: {'; '.join(table)}")
