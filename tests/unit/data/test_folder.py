"""Pictures in folders: which, in what order, with what captions, and what is said when none."""

import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_files import indexed
from PIL import Image

from torchtitan_flux.data.sources import image_folder as folder_module
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import SourceOptions, UnreadableItem


def picture(path: Path, shade: int = 0, size: tuple[int, int] = (11, 7)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), shade, np.uint8)
    name = path.suffix[1:].lower()
    Image.fromarray(pixels).save(path, {"jpg": "JPEG", "tif": "TIFF"}.get(name, name.upper()))


def captioned(path: Path, text: str = "a picture", shade: int = 0) -> None:
    picture(path, shade)
    path.with_suffix(".txt").write_text(text, encoding="utf-8")


def source(root: Path, **options) -> IndexedSource:
    return indexed("folder", root, **options)


def ids(items: IndexedSource) -> list[str]:
    return [items.index[i].item_id for i in range(len(items))]


def refusal(items: IndexedSource, index: int) -> str:
    with pytest.raises(UnreadableItem) as caught:
        items[index]
    return str(caught.value)


def test_all_pictures_in_order_with_their_pixels_and_captions(tmp_path):
    names = ["b.png", "a.jpg", "sub/ü ñ.JPEG", "sub/c.webp", "z/10.bmp", "z/9.gif", "t.tif"]
    for number, name in enumerate(names):
        captioned(tmp_path / name, f"no. {name}", 10 * number)
    for other in ("notes.md", ".hidden.jpg", ".git/x.jpg", "x.jpg.part"):
        picture(tmp_path / "sub" / "c.png")
        (tmp_path / other).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "a.jpg", tmp_path / other)
    items = source(tmp_path)
    expected = ["a.jpg", "b.png", "t.tif", "sub/c.png", "sub/c.webp", "sub/ü ñ.JPEG"]
    expected += ["z/10.bmp", "z/9.gif"]
    assert ids(items) == expected
    for index, name in enumerate(expected):
        item = items[index]
        assert item.item_id == name
        stem = "no. sub/c.webp" if name == "sub/c.png" else f"no. {name}"
        assert item.captions == (stem,)
        assert item.image.tobytes() == Image.open(tmp_path / name).tobytes()
        row = items.index[index]
        assert (row.width, row.height) == (11, 7)
        assert row.length == (tmp_path / name).stat().st_size


def test_several_captions(tmp_path):
    captioned(tmp_path / "lines.png", "\ufeffone\r\n\r\n two \nthree")
    picture(tmp_path / "list.png")
    picture(tmp_path / "twice.png")
    rows = [
        {"file_name": "list.png", "text": ["a", "b"]},
        {"file_name": "twice.png", "text": "c"},
        {"file_name": "./twice.png", "text": "d"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    others = [("a", "b"), ("c", "d")]
    for lines, captions in (False, ("one\r\n\r\n two \nthree",)), (True, ("one", "two", "three")):
        items = source(tmp_path, captions_by_line=lines)
        assert [items[i].captions for i in range(3)] == [captions, *others]
        noted = [note.text for note in items.index.notes]
        assert ["several lines" in text for text in noted] == [True] * (not lines)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_in_any_directory_names_files_relative_to_it(tmp_path, kind):
    for name in ("a.png", "in/b.png", "in/deep/c.jpg", "in/kept.data"):
        picture(tmp_path / name) if name[-4:] != "data" else shutil.copy(
            tmp_path / "a.png", tmp_path / name
        )
    (tmp_path / "in/b.txt").write_text("the metadata say it better")
    top = [("a.png", "über"), ("missing.png", "x")]
    inner = [("b.png", 'with "quotes",\nand lines'), ("deep/c.jpg", "c"), ("kept.data", "k")]
    inner += [("../in/deep/../deep/c.jpg", "c again")]
    for folder, rows in (("", top), ("in", inner)):
        path = tmp_path / folder / f"metadata.{kind}"
        if kind == "jsonl":
            lines = [
                json.dumps({"file_name": n, "caption": c}, ensure_ascii=False) for n, c in rows
            ]
            path.write_text("\n".join(lines), encoding="utf-8")
        else:
            quoted = [",".join('"' + s.replace('"', '""') + '"' for s in row) for row in rows]
            path.write_text("\ufefffile_name,caption\n" + "\n".join(quoted), encoding="utf-8")
    items = source(tmp_path)
    assert ids(items) == ["a.png", "in/b.png", "in/deep/c.jpg", "in/kept.data", "missing.png"]
    assert [items[i].captions for i in range(4)] == [
        ("über",),
        ('with "quotes",\nand lines',),
        ("c", "c again"),
        ("k",),
    ]
    assert refusal(items, 4) == "missing.png: does not exist"


def test_the_caption_column_is_the_one_named_or_the_first_known(tmp_path):
    picture(tmp_path / "a.png")
    row = {"file_name": "a.png", "prompt": "p", "caption": "c", "alt": "other"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert source(tmp_path)[0].captions == ("c",)
    assert source(tmp_path, caption_column="alt")[0].captions == ("other",)
    assert source(tmp_path)[0].captions == ("c",)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n{"file', "line 2: Unterm"),
        ("metadata.jsonl", b"\n[1]", "line 2: is no JSON object"),
        ("metadata.jsonl", b'{"text": "x"}', "line 1: no name stands in 'file_name'"),
        ("metadata.jsonl", b'{"file_name": "a.png", "label": 3}', "no line has 'text' or 'cap"),
        ("metadata.jsonl", b'{"file_name": "../a.png", "text": "x"}', "line 1: .* outside"),
        ("metadata.jsonl", b'{"file_name": "/a.png", "text": "x"}', "line 1: .* not relative"),
        ("metadata.jsonl", b'{"file_name": "\\ud800", "text": "x"}', "line 1: .* cannot be"),
        ("metadata.jsonl", b'{"n": ' + b"1" * 5000 + b"}", "line 1: Exceeds"),
        ("metadata.csv", b"file,text\na.png,x\n", "line 2: no name stands in 'file_name'"),
        ("metadata.csv", b"file_name,label\na.png,x\n", "no line has 'text'"),
        ("metadata.csv", b'file_name,text\na.png,x\nb.png,"x\n', "line 3: unexpected end"),
        (
            "metadata.csv",
            b'file_name,text\na.png,"x\nb.png,y\n',
            "unexpected end .* begins in line 2",
        ),
        ("metadata.csv", b"file_name,text\n,x\n", "line 2: no name stands"),
        ("metadata.jsonl", b'{"file_name": 3}', "line 1: no name stands"),
        ("metadata.csv", b"file_name,text\na.png,\xff\n", "line 2: is not UTF-8"),
        ("metadata.csv", "file_name,text\na.png,x\n".encode("utf-16"), "line 1: is not UTF-8"),
        ("metadata.csv", "file_name,text\na.png,x\n".encode("utf-16-le"), "line 1: is not UTF-8"),
        ("metadata.jsonl", '{"file_name": "a.png"}'.encode("utf-16-be"), "line 1: is not UTF-8"),
    ],
)
def test_metadata_that_cannot_be_understood_are_named(tmp_path, name, text, message):
    picture(tmp_path / "a.png")
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))}.*{message}"):
        source(tmp_path)


def test_utf_16_without_a_mark_is_no_caption(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("a cat".encode("utf-16-le"))  # which is valid UTF-8
    row = source(tmp_path).index[0]
    assert (row.captions, row.reason) == ((), "its .txt is not UTF-8: it has zero bytes")


@pytest.mark.parametrize(
    ("file", "kind"), [("0.TAR", "webdataset"), ("0.parquet", "parquet"), ("0.arrow", "parquet")]
)
def test_a_folder_for_another_source_is_told(tmp_path, file, kind):
    (tmp_path / file).touch()
    with pytest.raises(
        ValueError, match=rf'holds no pictures.*read by training.dataset = "{kind}"'
    ):
        source(tmp_path)


def test_a_caption_column_that_is_nowhere_is_named(tmp_path):
    captioned(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    with pytest.raises(ValueError, match=r"no line has 'alt'.*data\.caption_column"):
        source(tmp_path, caption_column="alt")


def test_what_cannot_be_read_is_an_item_with_a_reason(tmp_path):
    picture(tmp_path / "bare.png")
    captioned(tmp_path / "blank.png", " \n")
    captioned(tmp_path / "bytes.png")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    captioned(tmp_path / "empty.png")
    (tmp_path / "empty.png").write_bytes(b"")
    captioned(tmp_path / "gone.png")
    captioned(tmp_path / "huge.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    captioned(tmp_path / "noise.png")
    (tmp_path / "noise.png").write_bytes(b"noise" * 100)
    items = source(tmp_path)
    assert [items.index[i].reason for i in (0, 1, 2, 3, 4, 6)] == [
        "has no caption",
        "has no caption",
        "its .txt is not UTF-8",
        "the file is empty",
        "",
        "is a broken link",
    ]
    assert items.index[3].captions == ("a picture",)  # whoever reads it tries again
    assert items.usable_rows.tolist() == [i in (4, 5) for i in range(8)]
    (tmp_path / "gone.png").unlink()
    assert len(items) == 8
    assert refusal(items, 0) == "bare.png: has no caption"
    assert refusal(items, 1) == "blank.png: has no caption"
    assert refusal(items, 2) == "bytes.png: its .txt is not UTF-8"
    assert refusal(items, 3) == "empty.png: the file is empty"
    assert refusal(items, 4) == "gone.png: does not exist"
    assert refusal(items, 6) == "link.png: is a broken link"
    assert refusal(items, 7).startswith("noise.png: no image")
    assert items.index[7].reason == refusal(items, 7).removeprefix("noise.png: ")
    assert "decompression bomb" in refusal(source(tmp_path, max_pixels=50), 4)
    with pytest.raises(IndexError):
        items[8]


@pytest.mark.parametrize(
    ("split", "key"), [("train", "training.dataset_path"), ("held_out", "validation.dataset_path")]
)
def test_errors_name_the_key(tmp_path, split, key):
    def fails(path: str | None, message: str) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(key)}: .*{message}"):
            build_source("folder", split, SourceOptions(path=path))

    fails(None, "not set; name the data")
    fails(f"{tmp_path}/nowhere", "nowhere does not exist")
    (tmp_path / "file.tar").write_text("")
    fails(f"{tmp_path}/file.tar", 'is not a folder; training.dataset = "webdataset"')
    fails(str(tmp_path), r"holds no pictures")


def test_metadata_without_any_picture_make_items_that_are_missing(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\nimages/a.png,x\n")
    assert refusal(source(tmp_path), 0) == "images/a.png: does not exist"


def rebuilt(root: Path, caplog, **options) -> bool:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        source(root, **options)
    assert ("built anew" in caplog.text) == ("Indexed" in caplog.text)
    return "built anew" in caplog.text


@pytest.mark.parametrize("watched", ["files", "directories"])
def test_changes_are_noticed(tmp_path, caplog, monkeypatch, watched):
    if watched == "directories":
        monkeypatch.setattr(folder_module, "WATCHED_FILES", 2)
    captioned(tmp_path / "a.png", "a")
    captioned(tmp_path / "sub" / "b.png", "b")
    (tmp_path / "sub" / "metadata.csv").write_text("file_name,text\nb.png,bee\n")
    source(tmp_path)
    assert not rebuilt(tmp_path, caplog)

    captioned(tmp_path / "sub" / "c.png", "c")
    assert rebuilt(tmp_path, caplog)
    assert not rebuilt(tmp_path, caplog)
    (tmp_path / "a.png").unlink()
    assert rebuilt(tmp_path, caplog)
    captioned(tmp_path / "new" / "d.png", "d")
    assert rebuilt(tmp_path, caplog)
    (tmp_path / "sub" / "metadata.csv").write_text("file_name,text\nb.png,boo\n")
    assert rebuilt(tmp_path, caplog)
    assert source(tmp_path)[1].captions == ("boo",)
    shutil.rmtree(tmp_path / "new")
    assert rebuilt(tmp_path, caplog)
    assert ids(source(tmp_path)) == ["sub/b.png", "sub/c.png"]

    # Of more than 200,000 files, edits in place are not looked for.
    (tmp_path / "sub" / "c.txt").write_text("sea")
    assert rebuilt(tmp_path, caplog) == (watched == "files")
    os.utime(tmp_path / "sub" / "c.png", ns=(1, 1))
    assert rebuilt(tmp_path, caplog) == (watched == "files")
    assert not rebuilt(tmp_path, caplog)


@pytest.mark.parametrize("watched", ["files", "directories"])
@pytest.mark.parametrize("where", [".", "index", "../index"])
def test_an_index_folder_inside_of_the_data_is_no_change_of_theirs(
    tmp_path, caplog, monkeypatch, where, watched
):
    if watched == "directories":
        monkeypatch.setattr(folder_module, "WATCHED_FILES", 0)
    root = tmp_path / "data"
    captioned(root / "a.png")
    source(root, index_folder=root / where)
    assert list(tmp_path.rglob("*.arrow"))
    assert not rebuilt(root, caplog, index_folder=root / where)
    assert ids(source(root, index_folder=root / where)) == ["a.png"]


def test_crosses_to_workers(tmp_path):
    for number in range(5):
        captioned(tmp_path / f"{number}.png", f"no. {number}", number)
    items = source(tmp_path)
    again = pickle.loads(pickle.dumps(items))
    assert [again[i].captions for i in range(5)] == [items[i].captions for i in range(5)]
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            found = pool.map(items.__getitem__, range(5))
        assert [item.item_id for item in found] == ids(items)


def test_a_held_out_share_splits_it(tmp_path):
    for number in range(7):
        captioned(tmp_path / f"{number}.png")
    options = SourceOptions(path=str(tmp_path), held_out_share=0.3)
    parts = [build_source("folder", split, options) for split in ("train", "held_out")]
    found = [{part[i].item_id for i in range(len(part))} for part in parts]
    assert [len(part) for part in found] == [5, 2]
    assert len(found[0] | found[1]) == 7
    assert [part.name for part in parts] == ["folder", "folder"]
