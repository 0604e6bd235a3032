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
    assert check(*folder_keys(pictures), "--data.default_caption", "") == 0
    (pictures / "a.txt").write_text("a square")
    assert check(*folder_keys(pictures)) == 0
    assert "The configuration is sound" in capsys.readouterr().out


def test_no_caption_at_all_and_a_wrong_key_are_one_report(pictures, capsys):
    with pytest.raises(SystemExit) as end:
        check(*folder_keys(pictures), "--optimizer.lr", "-1")
    assert end.value.code == 2
    report = capsys.readouterr().err
    assert "optimizer.lr = -1.0 must be at least 0" in report
    assert "training.dataset_path: none of the 1 items" in report
    assert "has no caption (a.png)" in report


@pytest.mark.parametrize(
    ("dataset", "path", "problem"),
    [
        ("folder", ".", "holds no pictures"),
        ("webdataset", "{0..3}.tar", "0.tar and 3 more does not exist"),
        ("folder", None, "training.dataset_path is not set"),  # then data are not opened
    ],
)
def test_data_that_are_not_there(tmp_path, capsys, dataset, path, problem):
    keys = ["--training.dataset", dataset]
    with pytest.raises(SystemExit):
        check(*keys, *(["--training.dataset_path", f"{tmp_path}/{path}"] if path else []))
    report = capsys.readouterr().err
    assert problem in report
    assert report.count("training.dataset_path") == 1
