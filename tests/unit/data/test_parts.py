"""Parts of data sets by the names of their files and folders."""

from pathlib import Path

import numpy as np
import pytest
from data_files import indexed
from PIL import Image

from torchtitan_flux.data.sources.parts import not_read, own_parts, part_of, part_of_folder
from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import SourceOptions, Split
from torchtitan_flux.data.sources.split import SourcePart

SPLITS: tuple[Split, ...] = ("train", "held_out")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train", "train"),
        ("Train2017", "train"),
        ("training_set", "train"),
        ("val", "validation"),
        ("val_2017", "validation"),
        ("VALID", "validation"),
        ("dev", "validation"),
        ("test-images", "test"),
        ("evaluation", "test"),
        ("trains", ""),
        ("test cars", ""),
        ("2017", ""),
        ("images", ""),
        ("train_val", ""),
    ],
)
def test_folders(name, part):
    assert part_of_folder(name) == part


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("data/train-00000-of-00005.parquet", "train"),
        ("val/0.tar", "validation"),
        ("train/test.tar", "test"),
        ("0.tar", ""),
        ("strain.tar", ""),
    ],
)
def test_files(name, part):
    assert part_of(name) == part


def test_which_part_is_whose():
    everything = ["train", "validation", "test", ""]
    assert own_parts(everything, "train", "x") == ("train", False)
    assert own_parts(everything, "held_out", "x") == ("validation", False)
    assert own_parts(["train", "test"], "held_out", "x") == ("test", False)
    assert own_parts(["train"], "held_out", "x") == ("train", True)
    assert own_parts([""], "train", "x") is None
    with pytest.raises(ValueError, match=r"^x has no train part, only te"):
        own_parts(["test"], "train", "x")
    parts = {"a": "train", "b": "validation", "c": "test", "d": ""}
    assert list(not_read(parts, ("train", False)).values()) == [["c"], ["d"]]
    assert not_read(parts, None) == {}


def png(root: Path, *names: str) -> None:
    for name in names:
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(path)
        path.with_suffix(".txt").write_text(name)


def ids(root: Path, split: Split, **options) -> list[str]:
    source = build_source("folder", split, SourceOptions(path=str(root), **options))
    found = [source[i] for i in range(len(source))]
    assert all(item.captions == (item.item_id.removesuffix(".png"),) for item in found)
    return [item.item_id for item in found]


def test_a_folder_of_parts(tmp_path):
    png(tmp_path, "train/cat/0", "train/1", "val/2", "test/3", "other/4", "5")
    (tmp_path / "labels").mkdir()
    for share in (0.0, 0.5):  # not used
        assert ids(tmp_path, "train", held_out_share=share) == ["train/1.png", "train/cat/0.png"]
        assert ids(tmp_path, "held_out", held_out_share=share, validates_training_data=True) == [
            "val/2.png"
        ]
    notes = indexed("folder", tmp_path).index.notes
    assert sorted((note.count, note.examples) for note in notes) == [
        (1, ("test",)),
        (2, ("other", "5.png")),
    ]
    png(tmp_path, "val/6")  # noticed by the part that it belongs to
    assert ids(tmp_path, "held_out") == ["val/2.png", "val/6.png"]


def test_parts_that_lie_deeper_are_told(tmp_path):
    png(tmp_path, "images/train/0.png", "images/val/a/1.png", "cars/val/2.png")
    source = indexed("folder", tmp_path)
    assert len(source) == 3
    notes = [note for note in source.index.notes if "named after parts" in note.text]
    assert [note.examples for note in notes] == [("cars/val", "images/train", "images/val")]


def test_metadata_at_the_root_caption_each_part(tmp_path):
    png(tmp_path, "train/0", "test/1")
    for text in tmp_path.rglob("*.txt"):
        text.unlink()
    (tmp_path / "metadata.csv").write_text(
        "file_name,text\ntrain/0.png,train/0\ntest/1.png,test/1\n"
    )
    assert ids(tmp_path, "train") == ["train/0.png"]
    assert ids(tmp_path, "held_out") == ["test/1.png"]


@pytest.mark.parametrize(
    "names",
    [
        ("train/0", "cars/1", "planes/2"),  # a class of trains
        ("test/0", "test/1"),
        ("train/0", "train/1", "2"),
        ("a/train/0", "a/val/1"),
    ],
)
def test_a_folder_without_both_parts_is_read_whole(tmp_path, names):
    png(tmp_path, *names)
    (tmp_path / "val" / "empty").mkdir(parents=True)
    everything = sorted(f"{name}.png" for name in names)
    assert sorted(ids(tmp_path, "train")) == everything
    parts = [ids(tmp_path, split, held_out_share=0.3) for split in SPLITS]
    assert sorted(parts[0] + parts[1]) == everything
    options = SourceOptions(path=str(tmp_path), held_out_share=0.3)
    assert isinstance(build_source("folder", "train", options), SourcePart)
    with pytest.raises(ValueError, match=r"validation\.dataset_path: .*has no validation or test"):
        ids(tmp_path, "held_out", validates_training_data=True)
