"""Every item of a data set: what it says, and whether it can be read."""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from torchtitan_flux.data.samples import TrainingSamples
from torchtitan_flux.data.sources.index import EXAMPLES
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.source import Source, UnreadableItem
from torchtitan_flux.data.sources.split import SourcePart, whole_of
from torchtitan_flux.data.survey import REFUSED, Found, unreadable_rows

_AHEAD = 1024
"""Items that are given to the decoding threads at once."""


class Inspected(NamedTuple):
    """One item.

    Attributes:
        item: its id.
        captions: those it is trained with.
        width, height: in pixels; None where they are not known.
        held_out: whether it is kept from training.
        unreadable: why it is not trained on, or None.
    """

    item: str
    captions: tuple[str, ...]
    width: int | None
    height: int | None
    held_out: bool
    unreadable: str | None


def inspect(samples: TrainingSamples, decode: bool) -> Iterator[Inspected]:
    """All items of the data set behind the samples, held-out ones too, in its order.

    Args:
        samples: as training reads them.
        decode: whether every picture is decoded; else an index is believed, which knows headers.
    """
    source = whole_of(samples.source)
    held_out = _held_out(samples.source)
    told = _told(source)
    tried = _decoded(samples, source) if decode else (None for _ in range(len(source)))
    for row, (said, met) in enumerate(zip(told, tried, strict=True)):
        reason = said
        if met is not None:  # what decoding meets counts; in the words of the index if it has any
            reason = met and (met if said in ("", REFUSED) else said)
        if isinstance(source, IndexedSource):
            known = source.index[row]
            captions, size = source.captions(known), (known.width or None, known.height or None)
            name = known.item_id
        else:  # made by the program: small, or drawn as they are asked for
            item = source[row]
            captions, size, name = item.captions, item.image.size, item.item_id
        yield Inspected(name, captions, *size, row in held_out, reason or None)


def unreadable(inspected: Iterator[Inspected]) -> list[Found]:
    """Reasons why items cannot be read, the most frequent first; other numbers are no other one."""
    found: dict[str, list[Inspected]] = {}
    for one in inspected:
        if one.unreadable:
            found.setdefault(re.sub(r"\d+", "", one.unreadable), []).append(one)
    return [
        Found(str(same[0].unreadable), len(same), tuple(one.item for one in same[:EXAMPLES]))
        for same in sorted(found.values(), key=len, reverse=True)
    ]


def _held_out(source: Source) -> set[int]:
    if not isinstance(source, SourcePart):
        return set()
    other = SourcePart(source.source, "held_out", source.share)
    return {other.row(index) for index in range(len(other))}


def _told(source: Source) -> Iterator[str]:
    """What the index says of each item, "" when nothing speaks against it."""
    if isinstance(source, IndexedSource):
        return unreadable_rows(source)
    return iter([""] * len(source))


def _decoded(samples: TrainingSamples, source: Source) -> Iterator[str]:
    """Why each item cannot be made into a training image, "" when it can."""

    def reason(row: int) -> str:
        try:
            samples.image(source[row], 0)
        except UnreadableItem as error:
            return error.reason
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # decoders let other threads run
        for start in range(0, len(source), _AHEAD):
            yield from threads.map(reason, range(start, min(start + _AHEAD, len(source))))


def as_json(one: Inspected) -> dict[str, Any]:
    """An item for JSON."""
    return {**one._asdict(), "captions": list(one.captions)}
