"""`./run_train.sh --check` opens the data too, and puts what it finds into the one report."""

import pytest
from PIL import Image

from torchtitan_flux.launch import launch


def check(dataset: str, path: object, *keys: str) -> int:
    data = ("--training.dataset", dataset, "--training.dataset_path", str(path))
    return launch("train", ["--check", "--validation.no-enable", "--score.no-enable", *data, *keys])


@pytest.fixture
def pictures(tmp_path):
    """A folder with one picture, without a caption."""
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    return tmp_path


def test_sound_data_are_sound(pictures, capsys):
    assert check("folder", pictures, "--data.default_caption", "") == 0
    (pictures / "a.txt").write_text("a square")
    assert check("folder", pictures) == 0
    assert capsys.readouterr().out.count("The configuration is sound") == 2


def test_no_caption_at_all_and_a_wrong_key_are_one_report(pictures, capsys):
    with pytest.raises(SystemExit) as end:
        check("folder", pictures, "--optimizer.lr", "-1")
    assert end.value.code == 2
    report = capsys.readouterr().err
    assert "optimizer.lr = -1.0: must be a number from 0" in report
    assert "training.dataset_path: none of the 1 items" in report
    assert "has no caption (a.png)" in report


@pytest.mark.parametrize(
    ("dataset", "path", "problem"),
    [
        ("folder", "", "holds no pictures"),
        ("webdataset", "{0..3}.tar", "0.tar does not exist"),
        ("folder", None, "training.dataset_path"),  # the key is wrong: nothing is opened
    ],
)
def test_data_that_are_not_there(tmp_path, dataset, path, problem, capsys):
    with pytest.raises(SystemExit):
        check(dataset, "" if path is None else tmp_path / path)
    assert capsys.readouterr().err.count(problem) == 1
