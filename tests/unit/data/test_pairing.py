"""Which caption belongs to which picture of a folder: never guessed, never lost in silence."""

import json
import os
import socket
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from data_files import indexed
from PIL import Image

from torchtitan_flux.data.formats import IMAGE_SUFFIXES
from torchtitan_flux.data.sources import image_folder as folder_module
from torchtitan_flux.data.sources import index_cache
from torchtitan_flux.data.sources import pairing as pairing_module
from torchtitan_flux.data.sources.image_folder import SHARED
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.pairing import (
    SPELLED_TWICE,
    TABLES,
    UNCLEAR,
    UNUSED,
    Pairs,
)
from torchtitan_flux.data.sources.source import UnreadableItem

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def png(path: Path, text: str | None = None, beside: str = ".txt") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((9, 11, 3), 99, np.uint8)).save(path, "PNG")
    if text is not None:
        path.with_suffix(beside).write_text(text, encoding="utf-8")


def source(root: Path, **options) -> IndexedSource:
    return indexed("folder", root, **options)


def captions(items: IndexedSource) -> dict[str, tuple[str, ...] | str]:
    """id -> captions, or why there are none."""
    rows = (items.index[i] for i in range(len(items)))
    return {row.item_id: row.captions or row.reason for row in rows}


def notes(items: IndexedSource) -> dict[str, tuple[str, ...]]:
    return {note.text: note.examples for note in items.index.notes}


@pytest.mark.parametrize(
    ("files", "pairs", "remarks"),
    [
        ("a.JPG a.TXT", {"a.JPG": ["a.TXT"]}, {}),
        ("a.jpg a.txt a.TXT", {"a.jpg": ["a.txt"]}, {"a.TXT": SPELLED_TWICE}),
        ("a.TXT a.jpg a.txt", {"a.jpg": ["a.txt"]}, {"a.TXT": SPELLED_TWICE}),
        ("a.jpg A.txt", {"a.jpg": []}, {"A.txt": UNUSED}),
        ("a.jpg a.caption", {"a.jpg": ["a.caption"]}, {}),
        ("a.jpg a.txt a.Caption", {"a.jpg": ["a.txt", "a.Caption"]}, {}),
        ("a.jpg a.b.txt a.b.png", {"a.jpg": [], "a.b.png": ["a.b.txt"]}, {}),
        ("a.jpg a.png a.txt", {"a.jpg": ["a.txt"], "a.png": ["a.txt"]}, {}),
        (f"{NFC}.jpg {NFD}.txt", {f"{NFC}.jpg": [f"{NFD}.txt"]}, {}),
        (f"{NFD}.jpg {NFC}.txt", {f"{NFD}.jpg": [f"{NFC}.txt"]}, {}),
        (
            f"{NFC}.jpg {NFD}.jpg {NFC}.txt {NFD}.txt",
            {f"{NFC}.jpg": [f"{NFC}.txt"], f"{NFD}.jpg": [f"{NFD}.txt"]},
            {},
        ),
        # The text is one picture's own; the other picture has none.
        (f"{NFC}.jpg {NFD}.jpg {NFC}.txt", {f"{NFC}.jpg": [f"{NFC}.txt"], f"{NFD}.jpg": []}, {}),
        ("a.jpg a.txt a.npz", {"a.jpg": ["a.txt"]}, {}),
        ("a.jpg a.json", {"a.jpg": []}, {"a.json": ".json files beside pictures are not read"}),
        (
            "a.jpg Metadata.csv labels.tsv notes.md",
            {},
            {"Metadata.csv": TABLES, "labels.tsv": TABLES},
        ),
        ("b.mp4 b.txt c.mp4", {}, {"b.mp4": ".mp4 files with a caption beside them are not read"}),
        ("metadata.jsonl readme.txt", {}, {"readme.txt": UNUSED}),
    ],
)
def test_texts_and_their_pictures(files, pairs, remarks):
    found = Pairs(files.split())
    assert {picture: found.texts(picture) for picture in pairs} == pairs
    assert {file: text for text, file in found.remarks()} == remarks


def test_of_three_spellings_none_is_guessed(tmp_path):
    # Two marks on one letter, in three ways to write them: ấ
    whole, half, apart = "\u1ea5", "\u00e2\u0301", "a\u0302\u0301"
    found = Pairs([f"{whole}.jpg", f"{half}.jpg", f"{apart}.txt"])
    assert found.texts(f"{whole}.jpg") == found.texts(f"{half}.jpg") == []
    assert found.is_unclear(f"{whole}.jpg")
    assert [text for text, _ in found.remarks()] == [UNCLEAR]
    png(tmp_path / f"{whole}.png")
    png(tmp_path / f"{half}.png")
    (tmp_path / f"{apart}.txt").write_text("whose?")
    assert set(captions(source(tmp_path)).values()) == {folder_module.UNCLEAR}


def test_pictures_that_are_not_read_are_noted_by_suffix(tmp_path, monkeypatch):
    png(tmp_path / "a.png", "read")
    for name in ("b.heic", "c.HEIC", "d.mp4", "e.svg"):
        (tmp_path / name).write_bytes(b"?")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "d.txt").write_text("d")
    without = IMAGE_SUFFIXES - {".heic"}
    monkeypatch.setattr(pairing_module, "IMAGE_SUFFIXES", without)
    monkeypatch.setattr("torchtitan_flux.data.formats.IMAGE_SUFFIXES", without)
    items = source(tmp_path)
    assert list(captions(items)) == ["a.png"]
    reads = "(`pip install pillow-heif` reads them)"
    assert notes(items) == {
        f".heic files with a caption beside them are not read {reads}": ("b.heic",),
        f".heic files are not read {reads}": ("c.HEIC",),
        ".mp4 files with a caption beside them are not read": ("d.mp4",),
    }


def test_every_suffix_that_pillow_decodes(tmp_path):
    wanted = {".jfif", ".jpe", ".jp2", ".j2k", ".ppm", ".pgm", ".tga", ".psd", ".ico", ".mpo"}
    assert wanted <= IMAGE_SUFFIXES
    assert not {".eps", ".ps", ".pdf", ".wmf", ".emf", ".h5", ".mpg", ".txt"} & IMAGE_SUFFIXES
    image = Image.fromarray(np.full((9, 11, 3), 99, np.uint8))
    saved = {"a.jfif": "JPEG", "b.JPE": "JPEG", "c.jp2": "JPEG2000", "d.tga": "TGA", "e.dib": "DIB"}
    saved |= {"f.pcx": "PCX", "g.qoi": "QOI", "h.sgi": "SGI", "i.apng": "PNG", "j.ppm": "PPM"}
    for name, format in saved.items():
        if format in Image.SAVE:
            image.save(tmp_path / name, format)
            (tmp_path / name).with_suffix(".txt").write_text(name)
    items = source(tmp_path)
    assert len(items) >= 9
    for i in range(len(items)):
        item = items[i]
        assert item.captions == (item.item_id,)
        assert item.image.convert("RGB").getpixel((5, 5)) == pytest.approx((99, 99, 99), abs=2)


@pytest.mark.parametrize(
    ("package", "format", "suffix"),
    [("pillow_heif", "HEIF", ".HEIC"), ("pillow_jxl", "JXL", ".jxl")],
)
def test_formats_of_plug_ins(tmp_path, package, format, suffix):
    pytest.importorskip(package)
    assert suffix.lower() in IMAGE_SUFFIXES
    image = Image.fromarray(np.full((9, 11, 3), 99, np.uint8))
    image.save(tmp_path / f"a{suffix}", format)
    (tmp_path / "a.txt").write_text("a")
    items = source(tmp_path)
    assert (items.index[0].width, items.index[0].height) == (11, 9)
    assert items[0].image.convert("RGB").getpixel((5, 5)) == pytest.approx((99, 99, 99), abs=3)


def test_a_caption_is_one_unless_lines_are_said_to_be(tmp_path):
    strange = "one\u2028line\x85that\x0bnever\x0cends"
    png(tmp_path / "a.png", strange)
    png(tmp_path / "b.png", "first\rsecond\r\nthird\n\n")
    whole = {"a.png": (strange,), "b.png": ("first\rsecond\r\nthird",)}
    assert captions(source(tmp_path)) == whole
    (several,) = (text for text in notes(source(tmp_path)) if "several lines" in text)
    assert notes(source(tmp_path))[several] == ("b.txt",)
    assert 'data.captions = "lines"' in several
    lines = captions(source(tmp_path, captions_by_line=True))
    assert lines == {"a.png": (strange,), "b.png": ("first", "second", "third")}


def test_of_texts_the_first_counts_that_says_anything(tmp_path):
    png(tmp_path / "a.png", " \n")
    (tmp_path / "a.caption").write_text("from .caption")
    png(tmp_path / "b.png", "from .txt")
    (tmp_path / "b.caption").write_text("not read")
    png(tmp_path / "c.png", "shared")
    png(tmp_path / "c.gif")
    items = source(tmp_path)
    assert captions(items) == {
        "a.png": ("from .caption",),
        "b.png": ("from .txt",),
        "c.gif": ("shared",),
        "c.png": ("shared",),
    }
    assert notes(items)[SHARED] == ("c.gif", "c.png")
    assert (
        "b.png" in notes(items)["pictures have a .caption besides their .txt, which alone is read"]
    )


@pytest.mark.parametrize("row", [{"width": 9}, {"text": ""}, {"text": None}, {"text": []}])
@pytest.mark.parametrize("others", [True, False])
def test_a_row_without_a_caption_hides_no_text(tmp_path, row, others):
    png(tmp_path / "a.png", "from .txt")
    rows = [{"file_name": "a.png"} | row]
    if others:
        png(tmp_path / "b.png")
        rows.append({"file_name": "b.png", "text": "from metadata"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions(source(tmp_path))["a.png"] == ("from .txt",)


def test_metadata_of_other_things_are_refused_unless_captions_are_elsewhere(tmp_path):
    png(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "width": 9}')
    with pytest.raises(ValueError, match=r"no line has 'text' or .*, only 'file_name', 'width'"):
        source(tmp_path)
    items = source(tmp_path, default_caption="")
    assert items[0].captions == ("",)
    (tmp_path / "a.txt").write_text("a")
    assert captions(source(tmp_path)) == {"a.png": ("a",)}


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
    png(tmp_path / "in" / "a b.png")
    for name in ("a b.png", ".\\a b.png"):
        (tmp_path / "in" / "metadata.csv").write_text(table.format(name), encoding="utf-8")
        assert captions(source(tmp_path)) == {"in/a b.png": ("a fox",)}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file_name,text\na.png,x\nb.png,red, green\n", "line 3: has more fields than line 1"),
        ("file_name;text\na.png;red; green\n", "line 2: has more fields.*with ';' in it"),
        ("file_name|text\na.png|x\n", "line 2: no name stands .*'file_name|text'"),
        ("image,text\na.png,x\n", "line 2: no name stands .*'image'"),
        ("file_name,text,Text\na.png,x,y\n", "line 1: has two columns called 'text'"),
        ("file_name,note\na.png,x\n", "no line has 'text' or .*, only 'file_name', 'note'"),
        (
            "version https://git-lfs.github.com/spec/v1\n",
            "is a Git LFS pointer, run `git lfs pull`",
        ),
    ],
)
def test_tables_that_cannot_be_right_are_refused(tmp_path, table, message):
    png(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(table)
    with pytest.raises(ValueError, match=f"metadata.csv.*{message.replace('|', '.')}"):
        source(tmp_path)


def test_metadata_name_pictures_in_any_spelling(tmp_path):
    png(tmp_path / NFD / f"{NFD}.png")
    png(tmp_path / "plain.png")
    png(tmp_path / "back\\slash.png")
    rows = [
        {"file_name": f"{NFC}\\{NFC}.png", "text": "composed"},
        {"file_name": "plain.png", "text": "plain"},
        {"file_name": "back\\slash.png", "text": "one file, on Linux"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions(source(tmp_path)) == {
        "back\\slash.png": ("one file, on Linux",),
        "plain.png": ("plain",),
        f"{NFD}/{NFD}.png": ("composed",),
    }
    png(tmp_path / NFC / f"{NFD}.png")  # two pictures now: neither is taken for what is named
    found = captions(source(tmp_path))
    assert found[f"{NFC}/{NFD}.png"] == found[f"{NFD}/{NFD}.png"] == "has no caption"
    assert source(tmp_path).index[len(found) - 1].reason == "does not exist"


def test_pipes_sockets_and_links_to_nowhere_never_block(tmp_path):
    png(tmp_path / "a.png", "a")
    png(tmp_path / "b.png")
    for name in ("b.txt", "c.png", "sub/metadata.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    there = os.getcwd()
    os.chdir(tmp_path)  # the path of a socket has to be short
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind("d.png")
    finally:
        os.chdir(there)
    (tmp_path / "e.png").symlink_to("/dev/zero")
    (tmp_path / "f.png").symlink_to("f.png")
    (tmp_path / "g.txt").symlink_to("nowhere")
    png(tmp_path / "g.png")
    items = source(tmp_path)
    found = captions(items)
    assert found.pop("f.png") in ("is a broken link", "has no caption")  # links to itself
    assert found == {
        "a.png": ("a",),
        "b.png": "has no caption",
        "g.png": "its .txt is a broken link",
    }
    plain = "names of pictures and texts that are a pipe, a socket, a device or a folder"
    assert set(notes(items)[plain]) == {"b.txt", "c.png", "d.png", "e.png"}
    assert notes(items)["metadata files that are a pipe, a socket or a device"] == (
        "sub/metadata.jsonl",
    )
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UnreadableItem, match=r"a\.png: is a pipe, not a file"):
        items[0]


@pytest.fixture
def refused(monkeypatch):
    """Paths that the operating system does not open or list: root may read everything."""
    names: set[str] = set()

    def refusing(real):
        def call(path, *args, **options):
            if os.path.basename(os.fspath(path)) in names:
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return real(path, *args, **options)

        return call

    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    for method in ("open", "read_bytes"):
        monkeypatch.setattr(Path, method, refusing(getattr(Path, method)))
    can_open = index_cache.can_open
    monkeypatch.setattr(
        index_cache,
        "can_open",
        lambda path, *args: os.path.basename(path) not in names and can_open(path, *args),
    )
    return names


def test_what_the_system_refuses_today_is_read_tomorrow(tmp_path, refused):
    png(tmp_path / "a.png", "a")
    png(tmp_path / "b.png", "b")
    png(tmp_path / "closed" / "c.png", "c")
    refused |= {"a.png", "b.txt", "closed"}
    items = source(tmp_path)
    rows = [items.index[i] for i in range(len(items))]
    assert [(row.item_id, row.captions, row.width, row.reason) for row in rows] == [
        ("a.png", ("a",), 0, ""),
        ("b.png", (), 11, ""),
    ]
    assert set({path for path, _ in items.index.refused}) == {
        str(tmp_path / "b.txt"),
        str(tmp_path / "closed"),
    }
    assert notes(items) == {
        "files or folders that cannot be opened: Permission denied": (
            str(tmp_path / "b.txt"),
            str(tmp_path / "closed"),
        )
    }
    with pytest.raises(UnreadableItem, match=r"a\.png: Permission denied"):
        items[0]
    assert source(tmp_path).index.identity == items.index.identity
    refused.discard("a.png")
    assert items[0].captions == ("a",)
    refused.clear()
    assert captions(source(tmp_path)) == {"a.png": ("a",), "b.png": ("b",), "closed/c.png": ("c",)}


def test_a_root_or_metadata_that_cannot_be_opened_is_refused(tmp_path, refused):
    png(tmp_path / "a.png", "a")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    refused.add("metadata.jsonl")
    with pytest.raises(ValueError, match=r"metadata\.jsonl cannot be opened: Permission denied"):
        source(tmp_path)
    refused.add(tmp_path.name)
    with pytest.raises(ValueError, match=r"^training\.dataset_path: .* cannot be opened: Perm"):
        source(tmp_path)


def test_other_options_of_captions_have_an_index_of_their_own(tmp_path):
    png(tmp_path / "a.png", "one\ntwo")
    kinds = [{}, {"captions_by_line": True}, {"caption_column": "text"}]
    indexes = [source(tmp_path, **options).index.path for options in kinds]
    assert len(set(indexes)) == 3


def test_other_formats_make_another_index(tmp_path, monkeypatch):
    png(tmp_path / "a.png", "a")
    before = source(tmp_path).index.identity
    assert source(tmp_path).index.identity == before
    monkeypatch.setattr("torchtitan_flux.data.sources.index_cache.formats", lambda: ("PNG", "NEW"))
    assert source(tmp_path).index.identity != before
