"""Names of data sets, and the held-out part of sources that have none of their own."""

import pickle

import pytest

from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import Source, SourceOptions, UnreadableItem
from torchtitan_flux.data.sources.split import SourcePart
from torchtitan_flux.latents import ImageSize


@pytest.mark.parametrize("name", ["digits", "shapes"])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_builds_the_known_sources(name, split):
    source = build_source(name, split, SourceOptions(image_size=ImageSize(16, 24)))
    assert isinstance(source, Source)
    assert source.name == name
    assert source[0].captions
    assert source[0].image.size == {"digits": (8, 8), "shapes": (24, 16)}[name]


@pytest.mark.parametrize(
    ("split", "key"), [("train", "training.dataset"), ("held_out", "validation.dataset")]
)
def test_unknown_names_say_which_key_and_what_is_known(split, key):
    with pytest.raises(ValueError, match=f"{key}: unknown data set 'digit'; known: .*digits, .*"):
        build_source("digit", split)


def test_unreadable_item_survives_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(UnreadableItem("folder/a.jpg", "truncated")))
    assert (error.item_id, error.reason) == ("folder/a.jpg", "truncated")
    assert str(error) == "folder/a.jpg: truncated"


@pytest.mark.parametrize("length", [2, 3, 5, 7, 10, 101, 997])
@pytest.mark.parametrize("share", [1e-9, 0.1, 1 / 3, 0.5, 0.999999])
def test_the_parts_are_disjoint_and_together_everything(make_source, length, share):
    source = make_source(length)
    train, held_out = (SourcePart(source, split, share) for split in ("train", "held_out"))
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
    for beyond in (-1, len(part)):
        with pytest.raises(IndexError):
            part[beyond]


@pytest.mark.parametrize(
    ("length", "share", "message"),
    [(1, 0.5, "a data set of 1 items"), (9, 1.5, r"1\.5 is not in"), (9, 0.0, r"0\.0 is not in")],
)
def test_refuses_by_key(make_source, length, share, message):
    with pytest.raises(ValueError, match=rf"^data\.held_out_share: {message}"):
        SourcePart(make_source(length), "train", share)
