import pickle

import pytest

from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import Source, SourceOptions, UnreadableItem
from torchtitan_flux.latents import ImageSize


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_builds_the_known_sources(name):
    for split in ("train", "held_out"):
        source = build_source(name, split, SourceOptions(image_size=ImageSize(16, 24)))
        assert isinstance(source, Source)
        assert source.name == name
        assert source[0].captions
    assert build_source("shapes", "train", SourceOptions(image_size=ImageSize(16, 24)))[
        0
    ].image.size == (24, 16)
    assert build_source("shapes", "train")[0].image.size == (64, 64)


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
