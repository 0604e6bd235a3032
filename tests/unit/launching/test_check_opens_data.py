"""`./run_train.sh --check` opens the data too, and puts what it finds into the one report."""

from pathlib import Path

import pytest
from PIL import Image

from torchtitan_flux.launch import launch


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (20, 20)).save(folder / "a.png")
    return folder


def check(*keys: str) -> int:
    return launch("train", ["--check", "--validation.no-enable", "--score.no-enable", *keys])


def folder_keys(path: Path) -> tuple[str, ...]:
    return ("--training.dataset", "folder", "--training.dataset_path", str(path))


def test_sound_data_are_sound(pictures, capsys):
    (pictures / "a.txt").write_text("a square")
    assert check(*folder_keys(pictures)) == 0
    assert "The configuration is sound" in capsys.readouterr().out


def test_no_caption_at_all_and_a_wrong_key_are_one_report(pictures, capsys):
    with pytest.raises(SystemExit) as end:
        check(*folder_keys(pictures), "--optimizer.lr", "-1")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "optimizer.lr = -1.0: must be at least 0" in said
    assert "training.dataset_path: none of the 1 items" in said
    assert "has no caption (a.png)" in said


def test_an_empty_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        check(*folder_keys(tmp_path))
    assert "holds no pictures" in capsys.readouterr().err


def test_a_missing_shard(tmp_path, capsys):
    pattern = str(tmp_path / "{0..3}.tar")
    with pytest.raises(SystemExit):
        check("--training.dataset", "webdataset", "--training.dataset_path", pattern)
    assert "0.tar and 3 more does not exist" in capsys.readouterr().err


def test_data_are_not_opened_where_their_keys_are_wrong(capsys):
    with pytest.raises(SystemExit):
        check("--training.dataset", "folder")
    assert capsys.readouterr().err.count("training.dataset_path") == 1


def test_without_training_captions_said_explicitly(pictures, capsys):
    assert check(*folder_keys(pictures), "--data.default_caption", "") == 0
