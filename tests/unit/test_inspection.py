"""scripts/inspect_data.py: every item and its faults, as training would meet them."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchtitan_flux.inspection import main

KEYS = ["--training.img_size", "32", "--encoder.pixel_channels", "3"]


def picture(seed: int, size=(48, 40)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


FAULTS = {
    "cut.jpg": lambda: picture(1)[:900],
    "empty.jpg": lambda: b"",
    "page.jpg": lambda: b"<!DOCTYPE html><html></html>",
    "tiny.jpg": lambda: picture(2, (4, 40)),
}


@pytest.fixture
def folder(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02d}.jpg").write_bytes(picture(number))
        (tmp_path / f"{number:02d}.txt").write_text(f"picture {number}")
    for name, content in FAULTS.items():
        (tmp_path / name).write_bytes(content())
        (tmp_path / name).with_suffix(".txt").write_text("a fault")
    (tmp_path / "silent.jpg").write_bytes(picture(99))
    return tmp_path


def inspected(folder: Path, *more: str, tmp: Path | None = None) -> int:
    data = ["--training.dataset", "folder", "--training.dataset_path", str(folder)]
    sheet = ["--sheet", str((tmp or folder.parent) / "sheet.png")]
    return main([*more, *sheet, *data, *KEYS])


def test_json_names_every_item_and_every_fault(folder, capsys, tmp_path_factory):
    assert inspected(folder, "--json", "--data.held_out_share", "0.2") == 0
    *items, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(items) == 25
    bad = {one["item"]: one["unreadable"] for one in items if one["unreadable"]}
    assert sorted(bad) == sorted([*FAULTS, "silent.jpg"])
    assert bad["silent.jpg"] == "has no caption"
    assert bad["tiny.jpg"] == "too small, data.min_image_size = 8"
    third = {"item": "03.jpg", "captions": ["picture 3"], "width": 48, "height": 40}
    assert items[3] == third | {"held_out": items[3]["held_out"], "unreadable": None}
    held_out = [one for one in items if one["held_out"]]
    assert "has no caption" not in [one["unreadable"] for one in held_out]
    summary = last["summary"]
    assert (summary["items"], summary["held_out"], len(held_out)) == (25, 5, 5)
    assert summary["decoded"] is True
    assert sum(one["count"] for one in summary["unreadable"]) == 5


def test_each_item_is_a_line_whatever_its_caption_holds(folder, capsys):
    caption = "one\r\ntwo\u2028three\x85four \x1b[31m é"
    (folder / "00.txt").write_bytes(caption.encode())
    assert inspected(folder, "--json") == 0
    lines = capsys.readouterr().out.splitlines()  # which splits at U+2028 and NEL, too
    assert len(lines) == 26
    assert json.loads(lines[0])["captions"] == [caption]
    assert inspected(folder, "--items") == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == r"00.jpg  48x40  'one\r\ntwo\u2028three\x85four \x1b[31m é'"
    assert second.startswith("01.jpg")


def test_a_sheet_that_cannot_be_written_is_refused(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        inspected(folder, "--sheet", str(folder), tmp=folder / "00.txt")
    assert ended.value.code == 2
    assert re.search("--sheet: .* cannot be written: ", capsys.readouterr().err)


def test_without_decoding_the_headers_are_believed(folder, capsys):
    assert inspected(folder, "--no-decode", "--items") == 0
    out = capsys.readouterr().out
    assert "cut.jpg  48x40  'a fault'" in out
    assert "tiny.jpg  4x40  cannot be read: too small" in out
    assert "judged by their headers" in out


def test_the_sheet_shows_what_is_trained_on(folder, capsys):
    assert inspected(folder, "--count", "7") == 0
    page = Image.open(folder.parent / "sheet.png")
    assert page.size == (6 * 66 - 2, 2 * 66 - 2)  # of 32 pixels, each twice
    assert len(page.crop((0, 0, 64, 64)).getcolors(64 * 64)) > 500  # noise, not a blank page
    assert f"sheet: {folder.parent / 'sheet.png'}" in capsys.readouterr().out


def test_data_that_a_run_refuses_are_listed_and_end_with_2(tmp_path, capsys):
    folder = tmp_path / "silent"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    with pytest.raises(SystemExit) as end:
        inspected(folder, "--items")
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out.count("cannot be read: has no caption") == 4  # each item, and the table
    assert "training.dataset_path: none of the 3 items" in err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["--training.dataset", "folder"], "training.dataset_path: is not set"),
        (["--training.dataset", "pictures"], 'training.dataset = "pictures": is not available'),
        (["--training.img_sizes", "3"], "did you mean training.img_size?"),
    ],
)
def test_wrong_keys_end_with_2(keys, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(keys)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_built_in_data_can_be_looked_at(tmp_path, capsys):
    assert main(["--sheet", str(tmp_path / "sheet.png"), "--count", "3"]) == 0
    assert "digits: 1,437 items" in capsys.readouterr().out
    assert Image.open(tmp_path / "sheet.png").width == 3 * 50 - 2
