"""Every item of a data set: what it says, and whether it can be read."""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import NamedTuple

from torchtitan_flux.data.samples import TrainingSamples
from torchtitan_flux.data.sources.index import EXAMPLES, Note
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.source import Source, UnreadableItem
from torchtitan_flux.data.sources.split import SourcePart, whole_of
from torchtitan_flux.data.survey import REFUSED, unreadable_rows

_CHUNK = 1024
"""Items that are given to the decoding threads at once."""


class Inspected(NamedTuple):
    """One item; width and height in pixels, None where they are not known; why it is unreadable."""

    item: str
    captions: tuple[str, ...]
    width: int | None
    height: int | None
    held_out: bool
    unreadable: str | None


def inspect(samples: TrainingSamples, decode: bool) -> Iterator[Inspected]:
    """All items of the data set behind the samples, held-out ones too, in its order.

    None of data that the program makes. With `decode` every picture is decoded as in training;
    else the index is believed, which knows headers.
    """
    source = whole_of(samples.source)
    if not isinstance(source, IndexedSource):
        return
    held_out = _held_out(samples.source)
    reasons, of_row = unreadable_rows(source)
    decoded = _decoded(samples, source) if decode else repeat(None, len(source))
    for number, (of, found) in enumerate(zip(of_row, decoded, strict=True)):
        row, reason = source.index[number], reasons[of]
        if found is not None and (not found or reason in ("", REFUSED)):
            reason = found  # what decoding meets counts; in the words of the index if it has any
        size = row.width or None, row.height or None
        captions = source.captions(row)
        yield Inspected(row.item_id, captions, *size, number in held_out, reason or None)


def unreadable(inspected: Iterator[Inspected]) -> list[Note]:
    """Reasons why items cannot be read; those that differ in numbers alone are one."""
    found: dict[str, list[tuple[str, str]]] = {}
    for one in inspected:
        if one.unreadable:
            group = found.setdefault(re.sub(r"\d+", "", one.unreadable), [])
            group.append((one.unreadable, one.item))
    return [
        Note(reasons[0], len(items), items[:EXAMPLES])
        for reasons, items in (
            zip(*group, strict=True) for group in sorted(found.values(), key=len, reverse=True)
        )
    ]


def _held_out(source: Source) -> set[int]:
    if not isinstance(source, SourcePart):
        return set()
    other = SourcePart(source.source, "held_out", source.share)
    return {other.row(index) for index in range(len(other))}


def _decoded(samples: TrainingSamples, source: Source) -> Iterator[str]:
    """Why each item cannot be made into a training image, "" when it can."""

    def reason(row: int) -> str:
        try:
            samples.image(source[row], 0)
        except UnreadableItem as error:
            return error.reason
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # decoders let other threads run
        for start in range(0, len(source), _CHUNK):
            yield from threads.map(reason, range(start, min(start + _CHUNK, len(source))))
