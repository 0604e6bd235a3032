"""The table of every start, from an index alone."""

import numpy as np
import pytest

from torchtitan_flux.data.order import Permutation
from torchtitan_flux.data.sources.index import Index, IndexWriter, Row
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.source import SourceOptions, items_digest
from torchtitan_flux.data.sources.split import SourcePart
from torchtitan_flux.data.survey import refuse_unusable, survey, why_unreadable
from torchtitan_flux.latents import ImageSize

SIZE = ImageSize(64, 64)


class Rows(IndexedSource):
    """An index without pictures behind it."""

    def read(self, row: Row) -> bytes:
        raise FileNotFoundError


def row(name: str, width=100, height=80, captions=("a cat",), reason="") -> Row:
    return Row(name, 0, 0, 1, width, height, captions, reason)


GOOD = [row(f"good{i}") for i in range(5)]
BAD = [
    row("silent", captions=(), reason="has no caption"),
    row("empty", 0, 0, reason="the file is empty"),
    row("empty too", 0, 0, captions=(), reason="the file is empty"),
    row("tiny", 7, 900),
    row("vast", 40_000, 40_000),
    row("shut", 0, 0),  # the system refused it when it was indexed
]


@pytest.fixture
def make(tmp_path):
    def build(rows, notes=(), **options) -> Rows:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.arrow"
        with IndexWriter(path, {}) as writer:
            for one in rows:
                writer.add(one)
            for text, name in notes:
                writer.note(text, name)
        return Rows("rows", "the data", Index(path), SourceOptions(min_size=8, **options))

    return build


def test_each_item_is_counted_once_with_its_reason(make):
    source = make([*GOOD, *BAD])
    found = survey(source, SIZE)
    assert found.items == 11
    assert {one.text: (one.count, one.examples) for one in found.unreadable} == {
        "the file is empty": (2, ("empty", "empty too")),
        "has no caption": (1, ("silent",)),
        "too small, data.min_image_size = 8": (1, ("tiny",)),
        "decompression bomb, data.max_image_pixels = 134217728": (1, ("vast",)),
        "could not be opened when it was indexed": (1, ("shut",)),
    }
    assert found.unreadable[0].count == 2  # the most frequent first
    assert [why_unreadable(source, one) == "" for one in (*GOOD, *BAD)] == [True] * 5 + [False] * 6


def test_a_default_caption_leaves_no_item_out_for_having_none(make):
    source = make([*GOOD, *BAD], default_caption="", caption_prefix="art: ")
    assert "has no caption" not in [one.text for one in survey(source, SIZE).unreadable]
    assert int(source.usable_rows.sum()) == 6
    assert source.captions(BAD[0]) == ("art: ",)
    assert source.captions(GOOD[0]) == ("art: a cat",)
    assert source.captions(BAD[2]) == ()  # another reason stays one


def cut_at_four_words(caption: str) -> dict[str, tuple[int, int]]:
    words = len(caption.split())
    return {"T5": (words, 4)} if words > 4 else {}


def test_the_notes(make):
    notes = [("shards are damaged", "a.tar"), ("shards are damaged", "b.tar")]
    notes += [("files", str(n)) for n in range(9)]
    rows = [row("wide", 300, 63), row("high", 63, 299, ("a b", "a b c d e f")), row("same", 64, 64)]
    assert list(survey(make([*rows, *BAD], notes), SIZE, cut_at_four_words).lines())[-5:] == [
        "          2  shards are damaged (a.tar, b.tar)",
        "          9  files (0, 1, 2, 3, 4, …)",
        "          3  pictures from 64x64 to 300x63 pixels",
        "          2  pictures smaller than 64x64 are enlarged (wide, high)",
        "          1  captions of 8 looked at are cut by T5",
    ]


def test_nothing_usable_is_refused_and_says_why(make):
    with pytest.raises(ValueError, match=r"training\.dataset_path: none of the 6 items") as error:
        refuse_unusable(make(BAD), 1.0, "training.dataset_path")
    table = str(error.value).partition(" can be trained on: ")[2].split("; ")
    assert table[0] == "2 × the file is empty (empty, empty too)"
    assert len(table) == 5
    assert "1 × has no caption (silent)" in table


def test_only_items_that_can_be_read_are_held_out(make):
    rows = [row(f"{i}", captions=() if i % 3 else ("x",), reason="has no caption" if i % 3 else "")
            for i in range(60)]  # fmt: skip
    source = make(rows)
    train, held_out = (SourcePart(source, split, 0.2) for split in ("train", "held_out"))
    kept = [held_out.row(i) for i in range(len(held_out))]
    assert len(kept) == 12
    assert all(source.usable_rows[kept])
    assert sorted(kept + [train.row(i) for i in range(len(train))]) == list(range(60))

    drawn = Permutation(0, "held_out", 60)  # which decides alone where all can be read
    part = SourcePart(make([row(f"{i}") for i in range(60)]), "held_out", 0.2)
    assert [part.row(i) for i in range(12)] == [drawn(i) for i in range(12)]
    with pytest.raises(ValueError, match="a data set of 7 items, 1 of which can be read"):
        SourcePart(make([GOOD[0], *BAD]), "train", 0.5)


def test_the_digest_is_of_names_in_their_order(make):
    names = ["a", "b", "c"]
    digest = items_digest(make([row(name) for name in names]))
    assert digest == items_digest(make([row(name, 9, 9, ("other",)) for name in names]))
    for others in (["a", "c", "b"], ["a", "b", "d"], ["ab", "c", ""]):
        assert digest != items_digest(make([row(name) for name in others]))
    parts = [
        SourcePart(make([row(n) for n in names]), split, 0.4) for split in ("train", "held_out")
    ]
    assert len({digest, *map(items_digest, parts)}) == 3


def test_many_indices_are_permuted_as_one_by_one():
    for length in (1, 2, 3, 97, 1437):
        permutation = Permutation(5, "key", length)
        indices = np.arange(length)
        assert permutation.many(indices).tolist() == [permutation(i) for i in range(length)]


def test_the_digest_of_a_part_is_of_every_held_out_item(make):
    """Which of thousands cannot be read changes what is held out, not the names."""

    def part(unreadable: int) -> SourcePart:
        rows = [row(f"{n}") for n in range(4000)]
        rows[unreadable] = row(f"{unreadable}", 0, 0, reason="the file is empty")
        return SourcePart(make(rows), "held_out", 0.5)

    drawn = [int(n) for n in Permutation(0, "held_out", 4000).many(np.arange(2000))]
    parts = [part(drawn[1000]), part(drawn[1001])]
    assert len({items_digest(one.source) for one in parts}) == 1
    assert len(set(map(items_digest, parts))) == 2
