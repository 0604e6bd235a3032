"""The held-out part of sources that have none of their own."""

import pickle

import pytest

from torchtitan_flux.data.sources.split import SourcePart, part_of


@pytest.mark.parametrize("length", [2, 3, 5, 7, 10, 101, 997])
@pytest.mark.parametrize("share", [1e-9, 0.1, 1 / 3, 0.5, 0.999999])
def test_the_parts_are_disjoint_and_together_everything(make_source, length, share):
    source = make_source(length)
    train, held_out = (part_of(source, split, share) for split in ("train", "held_out"))
    rows = [[part.row(i) for i in range(len(part))] for part in (train, held_out)]
    assert sorted(rows[0] + rows[1]) == list(range(length))
    assert min(len(train), len(held_out)) >= 1
    assert abs(len(held_out) - share * length) <= 1
    assert [held_out[i].item_id for i in range(len(held_out))] == [f"grays/{i}" for i in rows[1]]


def test_is_the_same_in_every_run_and_not_a_range(make_source):
    part = SourcePart(make_source(97), "held_out", 0.1)
    rows = [part.row(i) for i in range(len(part))]
    assert rows == [pickle.loads(pickle.dumps(part)).row(i) for i in range(len(part))]
    assert rows == [SourcePart(make_source(97), "held_out", 0.1).row(i) for i in range(len(part))]
    assert rows != sorted(rows)
    assert max(rows) - min(rows) > 48
    assert part.name == "grays"


def test_nothing_held_out_is_everything_for_both(make_source):
    source = make_source(3)
    assert part_of(source, "train", 0.0) is source
    assert part_of(source, "held_out", 0.0) is source


def test_refuses_by_key(make_source):
    with pytest.raises(ValueError, match=r"data\.held_out_share: a data set of 1 items"):
        part_of(make_source(1), "train", 0.5)
    with pytest.raises(ValueError, match=r"data\.held_out_share is 1\.5"):
        part_of(make_source(9), "train", 1.5)
    for beyond in (-1, 5):
        with pytest.raises(IndexError):
            SourcePart(make_source(10), "train", 0.5)[beyond]
