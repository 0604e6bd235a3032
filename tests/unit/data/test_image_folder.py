"""Pictures in folders: which, in what order, with what captions, never guessed, never lost."""

import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
from data_files import (
    captions,
    ids,
    indexed,
    notes,
    png,
    refuses,
    rows,
    unreadable,
)
from PIL import Image

from torchtitan_flux.data.formats import IMAGE_SUFFIXES
from torchtitan_flux.data.sources import image_folder
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.listing import LEFT_OUT
from torchtitan_flux.data.sources.split import part_of

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def picture(path: Path, text: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(99, (11, 9), "PNG" if path.suffix == ".png" else "JPEG"))
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")


def source(root: Path, **options) -> IndexedSource:
    return indexed("folder", root, **options)


def metadata(folder: Path, *records: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    (folder / "metadata.jsonl").write_text("\n\n".join(lines), encoding="utf-8")


def test_every_suffix_that_pillow_decodes(tmp_path):
    wanted = {".jfif", ".jpe", ".jp2", ".j2k", ".ppm", ".pgm", ".tga", ".psd", ".ico", ".mpo"}
    assert wanted <= IMAGE_SUFFIXES
    assert not {".eps", ".ps", ".pdf", ".wmf", ".emf", ".h5", ".mpg", ".txt"} & IMAGE_SUFFIXES
    saved = {"a.jfif": "JPEG", "b.JPE": "JPEG", "c.jp2": "JPEG2000", "d.tga": "TGA", "e.dib": "DIB"}
    saved |= {"f.pcx": "PCX", "g.qoi": "QOI", "h.sgi": "SGI", "i.apng": "PNG", "j.ppm": "PPM"}
    for name, format in saved.items():
        if format in Image.SAVE:
            Image.new("RGB", (11, 9), (99, 99, 99)).save(tmp_path / name, format)
            (tmp_path / name).with_suffix(".txt").write_text(name)
    for other in (".hidden.jfif", ".git/x.jfif", "x.jfif.part"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "a.jfif", tmp_path / other)
    items = source(tmp_path)
    assert len(items) >= 9
    assert ids(items) == sorted(name for name, format in saved.items() if format in Image.SAVE)
    for item in (items[i] for i in range(len(items))):
        assert item.captions == (item.item_id,)
        assert item.image.convert("RGB").getpixel((5, 5)) == pytest.approx((99, 99, 99), abs=2)


def test_texts_beside_pictures(tmp_path):
    texts = {
        "a.JPG": {"a.TXT": "in any case"},
        "b.png": {"b.txt": " \n", "b.Caption": "where the other is blank"},
        "c.png": {"c.txt": "counts", "c.TXT": "not read", "c.caption": "not read"},
        "d.jpg": {"d.txt": "shared", "D.txt": "of no picture", "d.b.txt": "of none"},
        "d.png": {},
        "e.png": {"e.txt": "\ufefffirst\n\nsecond", "e.json": "not read"},
        "f.png": {},
    }
    for name, files in texts.items():
        picture(tmp_path / name)
        for file, text in files.items():
            (tmp_path / file).write_text(text, encoding="utf-8")
    metadata(tmp_path, *({"file_name": "f.png", "text": t} for t in (["a", "b"], "c")))
    items = source(tmp_path)
    assert captions(items) == {
        "a.JPG": ("in any case",),
        "b.png": ("where the other is blank",),
        "c.png": ("counts",),
        "d.jpg": ("shared",),
        "d.png": ("shared",),
        "e.png": ("first\n\nsecond",),
        "f.png": ("a", "b", "c"),
    }
    unread = {image_folder.UNREAD: ("D.txt", "d.b.txt", "e.json")}
    assert notes(items) == unread | {image_folder.SEVERAL_LINES: ("e.txt",)}
    assert notes(source(tmp_path, captions_by_line=True)) == unread


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_in_any_directory_names_files_relative_to_it(tmp_path, kind):
    for name in ("a.png", "in/b.png", "in/deep/c.jpg"):
        picture(tmp_path / name)
    shutil.copy(tmp_path / "a.png", tmp_path / "in/kept.data")
    (tmp_path / "in/b.txt").write_text("the metadata say it better")
    top = [("a.png", "über"), ("missing.png", "x")]
    inner = [("b.png", 'with "quotes",\nand lines'), ("deep/c.jpg", "c"), ("kept.data", "k")]
    inner += [("../in/deep/../deep/c.jpg", "c again")]
    for folder, pairs in ((tmp_path, top), (tmp_path / "in", inner)):
        if kind == "jsonl":
            metadata(folder, *({"file_name": name, "caption": text} for name, text in pairs))
        else:
            quoted = [",".join('"' + s.replace('"', '""') + '"' for s in row) for row in pairs]
            text = "\ufefffile_name,caption\n" + "\n".join(quoted)
            (folder / "metadata.csv").write_text(text, encoding="utf-8")
    items = source(tmp_path)
    assert captions(items) == {
        "a.png": ("über",),
        "in/b.png": ('with "quotes",\nand lines',),
        "in/deep/c.jpg": ("c", "c again"),
        "in/kept.data": ("k",),
        "missing.png": ("x",),
    }
    assert rows(items)[-1].reason == unreadable(items, 4) == "does not exist"


def test_the_caption_column_is_the_one_named_or_the_first_known(tmp_path):
    picture(tmp_path / "a.png")
    metadata(tmp_path, {"file_name": "a.png", "prompt": "p", "caption": "c", "alt": "other"})
    indexes = {source(tmp_path).index.path}
    for options, wanted in (({}, "c"), ({"caption_column": "alt"}, "other"), ({}, "c")):
        items = source(tmp_path, **options)
        assert items[0].captions == (wanted,)
        indexes.add(items.index.path)
    assert len(indexes) == 2
    refuses("folder", tmp_path, r"no line has 'url'.*data\.caption_column", caption_column="url")


@pytest.mark.parametrize("row", [{"width": 9}, {"text": ""}, {"text": None}, {"text": []}])
def test_a_row_without_a_caption_hides_no_text(tmp_path, row):
    picture(tmp_path / "a.png", "from .txt")
    metadata(tmp_path, {"file_name": "a.png"} | row)
    assert captions(source(tmp_path))["a.png"] == ("from .txt",)


@pytest.mark.parametrize(
    "table",
    [
        "file_name,text\n{},a fox\n",
        "file_name;text\n{};a fox\n",
        "file_name\ttext\n{}\ta fox\n",
        "file_name, text\n{}, a fox\n",
        "file_name ; text\n{} ; a fox\n",
        "File_Name,Caption\n{},a fox\n",
        "\ufefffile_name;number;text\r\n{};3;a fox\r\n",
    ],
)
def test_tables_of_spreadsheets(tmp_path, table):
    picture(tmp_path / "in" / "a b.png")
    for name in ("a b.png", ".\\a b.png"):
        (tmp_path / "in" / "metadata.csv").write_text(table.format(name), encoding="utf-8")
        assert captions(source(tmp_path)) == {"in/a b.png": ("a fox",)}


CSV = "file_name,text\na.png,x\n"


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("jsonl", b'{"file_name": "a.png", "text": "x"}\n{"file', "line 2: is no JSON"),
        ("jsonl", b"\n[1]", "line 2: is no JSON object"),
        ("jsonl", b'{"text": "x"}', "line 1: no name stands in 'file_name': .'text'"),
        ("jsonl", b'{"file_name": "../a.png", "text": "x"}', "line 1: .* outside"),
        ("jsonl", b'{"file_name": "/a.png", "text": "x"}', "line 1: .* outside"),
        ("jsonl", b'{"file_name": "\\ud800", "text": "x"}', "line 1: .* cannot be"),
        ("jsonl", b"[" * 100_000, "line 1: is no JSON"),
        ("jsonl", '{"file_name": "a.png"}'.encode("utf-16-be"), "line 1: is not UTF-8"),
        ("csv", b"file,text\na.png,x\n", "line 2: no name stands in 'file_name': .'file'"),
        ("csv", b"file_name|text\na.png|x\n", "line 2: no name stands in .*file_name.text"),
        ("csv", b'file_name,text\na.png,"x\nb.png,y\n', "line 3: unexpected end"),
        ("csv", CSV.encode() + b"b.png,red, green\n", "line 3: has more fields than line 1"),
        ("csv", b"file_name;text\na.png;red; green\n", "line 2: has more fields.*';' in .quotes"),
        ("csv", CSV.encode() + b"b.png,\xff\n", "line 3: is not UTF-8"),
        ("csv", CSV.encode("utf-16-le"), "line 1: is not UTF-8"),
        ("csv", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, run `git"),
    ],
)
def test_metadata_that_cannot_be_understood_are_named(tmp_path, kind, content, message):
    picture(tmp_path / "a.png")
    (tmp_path / f"metadata.{kind}").write_bytes(content)
    refuses("folder", tmp_path, rf"/metadata\.{kind}.*{message}")


def test_metadata_name_pictures_in_any_spelling(tmp_path):
    for name in (f"{NFD}/{NFD}", "plain", "back\\slash"):
        picture(tmp_path / f"{name}.png")
    texts = {f"{NFC}\\{NFC}": "composed", "plain": "plain", "back\\slash": "one file, on Linux"}
    metadata(tmp_path, *({"file_name": f"{name}.png", "text": t} for name, t in texts.items()))
    assert captions(source(tmp_path)) == {
        "back\\slash.png": ("one file, on Linux",),
        "plain.png": ("plain",),
        f"{NFD}/{NFD}.png": ("composed",),
    }


def test_what_cannot_be_read_is_named_and_never_waited_for(tmp_path, refused):
    for name in ("bytes", "closed/x", "gone", "shut", "text", "zeros"):
        picture(tmp_path / f"{name}.png", "x")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "zeros.txt").write_bytes("a cat".encode("utf-16-le"))  # which is valid UTF-8
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "text.txt").unlink()
    (tmp_path / "text.txt").symlink_to("nowhere")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    metadata(tmp_path, {"file_name": "pipe.png", "text": "x"})
    refused |= {"closed", "shut.png"}
    items = source(tmp_path)
    reasons = {
        "bytes": "its .txt is not UTF-8",
        "gone": "",
        "link": "is a broken link",
        "shut": "",
        "text": "its .txt is a broken link",
        "zeros": "its .txt is not UTF-8: it has zero bytes",
        "pipe": "is no file",
    }
    assert {row.item_id[:-4]: row.reason for row in rows(items)} == reasons
    assert items.usable_rows.tolist() == [name == "gone" for name in reasons]
    left_out = {"pipe.png", "device.png", "loop.png", "closed: Permission denied"}
    assert set(notes(items)[LEFT_OUT]) == left_out
    assert unreadable(items, 3) == "Permission denied"
    (tmp_path / "gone.png").unlink()
    assert unreadable(items, 1) == "does not exist"
    refused.clear()
    assert items[3].captions == ("x",)
    assert "closed/x.png" in captions(source(tmp_path))


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl", "root"])
def test_a_root_or_text_that_cannot_be_opened_is_refused(tmp_path, refused, name):
    picture(tmp_path / "root" / "a.png", "a")
    metadata(tmp_path / "root", {"file_name": "a.png", "text": ""})
    refused.add(name)
    refuses("folder", tmp_path / "root", f"{name} cannot be opened: Permission denied")


def test_what_is_no_folder_of_pictures_is_refused(tmp_path):
    (tmp_path / "0.TAR").touch()
    refuses("folder", tmp_path, r"holds no pictures; .*not read.*0\.TAR")
    refuses("folder", tmp_path / "0.TAR", "is not a folder")


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("train", "Train2017 training_set data/train-00000-of-00005.parquet"),
        ("validation", "val_2017 VALID dev val/0.tar"),
        ("test", "test-images evaluation train/test.tar"),
        ("", "trains 2017 images 0.tar strain.tar"),
    ],
)
def test_names_of_parts(part, names):
    assert {part_of(name) for name in names.split()} == {part}


def test_a_folder_of_parts(tmp_path):
    for name in ("Train2017/cat/0", "Train2017/1", "val_set/2", "other/4", "5"):
        picture(tmp_path / f"{name}.png", name)
    train = source(tmp_path)
    assert ids(train) == ["Train2017/1.png", "Train2017/cat/0.png"]
    assert list(notes(train).values()) == [("other", "5.png")]
    picture(tmp_path / "val_set/6.png", "")  # noticed by the part that it belongs to
    assert source(tmp_path).index.identity == train.index.identity
    assert len(indexed("folder", tmp_path, "held_out")) == 2


def test_metadata_at_the_root_caption_each_part(tmp_path):
    names = ("train/0.png", "test/1.png")
    for name in names:
        picture(tmp_path / name)
    metadata(tmp_path, *({"file_name": name, "text": name} for name in names))
    for split, name in zip(("train", "held_out"), names, strict=True):
        assert captions(indexed("folder", tmp_path, split)) == {name: (name,)}


@pytest.mark.parametrize(
    "names", ["train/0 cars/1 planes/2", "test/0 test/1", "train/0 train/1 2", "a/train/0 a/val/1"]
)
def test_a_folder_without_both_parts_is_read_whole(tmp_path, names):
    names = names.split()
    for name in names:
        picture(tmp_path / f"{name}.png", name)
    items = source(tmp_path)
    assert sorted(ids(items)) == sorted(f"{name}.png" for name in names)
    deeper = {image_folder.DEEPER_PARTS: ("a/train", "a/val")} if "a/val/1" in names else {}
    assert notes(items) == deeper
