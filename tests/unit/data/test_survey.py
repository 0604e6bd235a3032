"""The table of every start, from an index alone."""

import numpy as np
import pytest

from torchtitan_flux.data.order import Permutation
from torchtitan_flux.data.sources.index import Index, IndexWriter, Note, Row
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.source import SourceOptions, UnreadableItem, items_digest
from torchtitan_flux.data.sources.split import SourcePart
from torchtitan_flux.data.survey import Lengths, refuse_unusable, survey, unreadable_rows
from torchtitan_flux.latents import ImageSize

SIZE = ImageSize(64, 64)


class Rows(IndexedSource):
    """An index without pictures behind it; reading raises `problem`."""

    problem: Exception = FileNotFoundError()

    def read(self, row: Row) -> bytes:
        raise self.problem


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


class Words:
    """A word is a token, for both encoders."""

    limits = {"T5": 4, "CLIP": 3}  # noqa: RUF012

    def count(self, caption: str) -> tuple[int, int]:
        return len(caption.split()), len(caption.split())


def test_each_item_is_counted_once_with_its_reason(make):
    found = survey(make([*GOOD, *BAD]), SIZE)
    assert found.items == 11
    assert {one.text: (one.count, one.examples) for one in found.unreadable} == {
        "the file is empty": (2, ("empty", "empty too")),
        "has no caption": (1, ("silent",)),
        "too small, data.min_image_size = 8": (1, ("tiny",)),
        "decompression bomb, data.max_image_pixels = 134217728": (1, ("vast",)),
        "does not exist": (1, ("shut",)),  # tried again
    }
    assert found.unreadable[0].count == 2  # the most frequent first
    reasons, of_row = unreadable_rows(make([*GOOD, *BAD]))
    one_by_one = [reasons[number] for number in of_row]
    assert one_by_one[:5] == [""] * 5
    assert one_by_one[-1] == "could not be opened when it was indexed"
    assert set(one_by_one[5:-1]) == {one.text for one in found.unreadable} - {"does not exist"}


def test_a_default_caption_leaves_no_item_out_for_having_none(make):
    source = make([*GOOD, *BAD], default_caption="", caption_prefix="art: ")
    assert "has no caption" not in [one.text for one in survey(source, SIZE).unreadable]
    assert int(source.usable_rows.sum()) == 6
    assert source.captions(BAD[0]) == ("art: ",)
    assert source.captions(GOOD[0]) == ("art: a cat",)
    assert source.captions(BAD[2]) == ()  # another reason stays one


def test_what_the_index_lacks_is_part_of_the_table(make):
    notes = [("damaged shards", "a.tar"), ("damaged shards", "b.tar")]
    notes += [("files", str(n)) for n in range(9)]
    assert list(survey(make(GOOD, notes), SIZE).lines())[1:] == [
        "          2  damaged shards (a.tar, b.tar)",
        "          9  files (0, 1, 2, 3, 4, …)",
    ]


def test_pictures_that_will_be_enlarged(make):
    rows = [row("wide", 300, 63), row("high", 63, 300), row("same", 64, 64), *BAD]
    enlarged = survey(make(rows), SIZE).enlarged
    assert enlarged == [Note("pictures smaller than 64x64 are enlarged", 2, ("wide", "high"))]


def test_the_longest_caption_is_counted_whatever_the_sample(make, monkeypatch):
    monkeypatch.setattr("torchtitan_flux.data.survey.SAMPLED", 2)
    rows = [row(f"{i}") for i in range(50)]
    rows[20] = row("20", captions=("a b", "a b c d e f"))
    found = survey(make(rows), SIZE, Words())
    assert found.counted == 4  # both of row 20, the first and the last
    assert found.tokens["T5"] == Lengths(4, 2.0, 6, 0.25)
    assert "     25.0 %  of captions are cut: T5 takes 4 tokens, the longest has 6" in found.lines()


def test_sizes_and_aspect_ratios_of_what_can_be_read(make):
    rows = [row(f"{n}", 10 * n, 10) for n in (5, 3, 1, 4, 2)]
    found = survey(make([*rows, *BAD]), SIZE)
    assert found.sizes == [(10, 10), (20, 10), (30, 10), (40, 10), (50, 10)]
    assert found.aspects == {"1.0": 1, "2.0": 1, "3.0": 1, "4.0": 1, "5.0": 1}


def test_nothing_usable_is_refused_and_says_why(make):
    with pytest.raises(ValueError, match=r"training\.dataset_path: none of the 6 items") as error:
        refuse_unusable(make(BAD), 1.0, "training.dataset_path")
    table = str(error.value).partition(" can be trained on: ")[2].split("; ")
    assert table[0] == "2 × the file is empty (empty, empty too)"
    assert len(table) == 5
    assert "1 × has no caption (silent)" in table


def test_more_than_the_share_is_refused(make):
    many = make([row(f"{i}") for i in range(200)] + BAD)
    with pytest.raises(ValueError, match=r"6 of 206 .* data\.max_unreadable_share = 0\.02"):
        refuse_unusable(many, 0.02, "key")
    refuse_unusable(many, 0.03, "key")
    refuse_unusable(make([*GOOD, *BAD]), 0.06, "key")  # 6, of 100 at least


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


def test_a_refusal_of_the_system_is_reported_as_it_is_now(make):
    source = make([row("shut", 0, 0)])
    source.problem = PermissionError(13, "Permission denied")
    assert [one.text for one in survey(source, SIZE).unreadable] == ["Permission denied"]
    with pytest.raises(UnreadableItem, match="Permission denied"):
        source[0]


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
