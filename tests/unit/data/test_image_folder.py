"""Pictures in folders: which, in what order, with what captions, never guessed, never lost."""

import json
import os
import shutil
import socket
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
from torchtitan_flux.data.sources import image_folder, pairing
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.pairing import UNUSED, Pairs
from torchtitan_flux.data.sources.split import part_of, part_of_folder, split_files

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
TABLE = " files are not read (metadata.jsonl and metadata.csv would be)"
FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF"}


def picture(path: Path, text: str | None = None, shade: int = 99) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix[1:].lower()
    path.write_bytes(png(shade, (11, 9), FORMATS.get(suffix, suffix.upper())))
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")


def source(root: Path, **options) -> IndexedSource:
    return indexed("folder", root, **options)


def metadata(folder: Path, *records: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    (folder / "metadata.jsonl").write_text("\n\n".join(lines), encoding="utf-8")


def test_all_pictures_in_order_with_their_pixels_and_captions(tmp_path):
    names = ["b.png", "a.jpg", "sub/ü ñ.JPEG", "sub/c.webp", "z/10.bmp", "z/9.gif", "t.tif"]
    for number, name in enumerate(names):
        picture(tmp_path / name, f"no. {name}", 10 * number)
    for other in ("notes.md", ".hidden.jpg", ".git/x.jpg", "x.jpg.part"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "a.jpg", tmp_path / other)
    items = source(tmp_path)
    expected = ["a.jpg", "b.png", "t.tif", "sub/c.webp", "sub/ü ñ.JPEG", "z/10.bmp", "z/9.gif"]
    assert ids(items) == expected
    for index, name in enumerate(expected):
        item, row = items[index], items.index[index]
        assert item.captions == (f"no. {name}",)
        assert item.image.tobytes() == Image.open(tmp_path / name).tobytes()
        assert row[3:6] == ((tmp_path / name).stat().st_size, 11, 9)


@pytest.mark.parametrize(
    ("files", "pairs", "remarks"),
    [
        ("a.JPG a.TXT", {"a.JPG": ["a.TXT"]}, {}),
        ("a.jpg a.txt a.TXT", {"a.jpg": ["a.txt"]}, {"a.TXT": UNUSED}),
        ("a.TXT a.jpg a.txt", {"a.jpg": ["a.txt"]}, {"a.TXT": UNUSED}),
        ("a.jpg A.txt", {"a.jpg": []}, {"A.txt": UNUSED}),
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
        ("a.jpg a.json", {"a.jpg": []}, {"a.json": f".json{TABLE}"}),
        ("a.jpg M.csv l.tsv n.md", {}, {"M.csv": f".csv{TABLE}", "l.tsv": f".tsv{TABLE}"}),
        ("b.mp4 b.txt c.mp4", {}, {"b.mp4": ".mp4 files are not read"}),
        ("metadata.jsonl readme.txt", {}, {"readme.txt": UNUSED}),
    ],
)
def test_texts_and_their_pictures(files, pairs, remarks):
    found = Pairs(files.split())
    assert {name: found.texts(name) for name in pairs} == pairs
    assert {file: text for text, file in found.unread()} == remarks


def test_pictures_that_are_not_read_are_noted_by_suffix(tmp_path, monkeypatch):
    picture(tmp_path / "a.png", "read")
    for name in ("b.heic", "b.txt", "c.HEIC", "d.mp4", "d.txt", "e.svg"):
        (tmp_path / name).write_bytes(b"?")
    without = IMAGE_SUFFIXES - {".heic"}
    monkeypatch.setattr(pairing, "IMAGE_SUFFIXES", without)
    monkeypatch.setattr("torchtitan_flux.data.formats.IMAGE_SUFFIXES", without)
    reads = "(`pip install pillow-heif` reads them)"
    assert notes(source(tmp_path)) == {
        f".heic files are not read {reads}": ("b.heic", "c.HEIC"),
        ".mp4 files are not read": ("d.mp4",),
    }


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
    items = source(tmp_path)
    assert len(items) >= 9
    for item in (items[i] for i in range(len(items))):
        assert item.captions == (item.item_id,)
        assert item.image.convert("RGB").getpixel((5, 5)) == pytest.approx((99, 99, 99), abs=2)


def test_several_captions_and_texts_of_several_lines(tmp_path):
    picture(tmp_path / "b.png", "\ufefffirst\n\nsecond")
    picture(tmp_path / "c.png")
    metadata(
        tmp_path, {"file_name": "c.png", "text": ["a", "b"]}, {"file_name": "./c.png", "text": "c"}
    )
    items = source(tmp_path)
    assert captions(items) == {"b.png": ("first\n\nsecond",), "c.png": ("a", "b", "c")}
    assert notes(items) == {image_folder.SEVERAL_LINES: ("b.txt",)}
    assert not notes(source(tmp_path, captions_by_line=True))


def test_of_texts_the_first_counts_that_says_anything(tmp_path):
    picture(tmp_path / "a.png", " \n")
    (tmp_path / "a.caption").write_text("from .caption")
    picture(tmp_path / "b.png", "from .txt")
    (tmp_path / "b.caption").write_text("not read")
    picture(tmp_path / "c.png", "shared")
    picture(tmp_path / "c.gif")
    items = source(tmp_path)
    assert captions(items) == {
        "a.png": ("from .caption",),
        "b.png": ("from .txt",),
        "c.gif": ("shared",),
        "c.png": ("shared",),
    }
    assert notes(items)[image_folder.SHARED] == ("c.gif", "c.png")


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
@pytest.mark.parametrize("others", [True, False])
def test_a_row_without_a_caption_hides_no_text(tmp_path, row, others):
    picture(tmp_path / "a.png", "from .txt")
    picture(tmp_path / "b.png")
    named = [{"file_name": "b.png", "text": "from metadata"}] if others else []
    metadata(tmp_path, {"file_name": "a.png"} | row, *named)
    assert captions(source(tmp_path))["a.png"] == ("from .txt",)


def test_metadata_of_other_things_are_noted(tmp_path):
    picture(tmp_path / "a.png")
    metadata(tmp_path, {"file_name": "a.png", "width": 9})
    items = source(tmp_path)
    assert captions(items) == {"a.png": "has no caption"}
    (said,) = notes(items)["metadata files without captions"]
    assert "no line has 'text' or 'caption' or" in said
    assert "only 'file_name', 'width'" in said
    assert source(tmp_path, default_caption="")[0].captions == ("",)
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
    picture(tmp_path / "in" / "a b.png")
    for name in ("a b.png", ".\\a b.png"):
        (tmp_path / "in" / "metadata.csv").write_text(table.format(name), encoding="utf-8")
        assert captions(source(tmp_path)) == {"in/a b.png": ("a fox",)}


CSV = "file_name,text\na.png,x\n"


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("jsonl", b'{"file_name": "a.png", "text": "x"}\n{"file', "line 2: Unterm"),
        ("jsonl", b"\n[1]", "line 2: is no JSON object"),
        ("jsonl", b'{"text": "x"}', "line 1: no name stands in 'file_name': .'text'"),
        ("jsonl", b'{"file_name": 3}', "line 1: no name stands in"),
        ("jsonl", b'{"file_name": "../a.png", "text": "x"}', "line 1: .* outside"),
        ("jsonl", b'{"file_name": "/a.png", "text": "x"}', "line 1: .* not relative"),
        ("jsonl", b'{"file_name": "\\ud800", "text": "x"}', "line 1: .* cannot be"),
        ("jsonl", b'{"n": ' + b"1" * 5000 + b"}", "line 1: Exceeds"),
        ("jsonl", b"[" * 100_000, "line 1: .*recursion"),
        ("jsonl", '{"file_name": "a.png"}'.encode("utf-16-be"), "line 1: is not UTF-8"),
        ("csv", b"file,text\na.png,x\n", "line 2: no name stands in 'file_name': .'file'"),
        ("csv", b"file_name|text\na.png|x\n", "line 2: no name stands in .*file_name.text"),
        ("csv", b"file_name,text\n,x\n", "line 2: no name stands in"),
        ("csv", b'file_name,text\na.png,"x\nb.png,y\n', "unexpected end .* begins in line 2"),
        ("csv", CSV.encode() + b"b.png,red, green\n", "line 3: has more fields than line 1"),
        ("csv", b"file_name;text\na.png;red; green\n", "line 2: has more fields.*';' in .quotes"),
        ("csv", b"file_name,text,Text\na.png,x,y\n", "line 1: has two columns called 'text'"),
        ("csv", CSV.encode() + b"b.png,\xff\n", "line 3: is not UTF-8"),
        ("csv", CSV.encode("utf-16"), "line 1: is not UTF-8"),
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


def test_texts_and_links_that_cannot_be_read(tmp_path):
    for name in ("bytes", "gone", "text", "zeros"):
        picture(tmp_path / f"{name}.png", "x")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "zeros.txt").write_bytes("a cat".encode("utf-16-le"))  # which is valid UTF-8
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "text.txt").unlink()
    (tmp_path / "text.txt").symlink_to("nowhere")
    items = source(tmp_path)
    reasons = {
        "bytes": "its .txt is not UTF-8",
        "gone": "",
        "link": "is a broken link",
        "text": "its .txt is a broken link",
        "zeros": "its .txt is not UTF-8: it has zero bytes",
    }
    assert items.usable_rows.tolist() == [name == "gone" for name in reasons]
    (tmp_path / "gone.png").unlink()
    for index, (name, reason) in enumerate(reasons.items()):
        assert items.index[index].reason == reason, name
        assert unreadable(items, index) == (reason or "does not exist")


def test_pipes_sockets_and_links_to_themselves_never_block(tmp_path):
    picture(tmp_path / "a.png", "a")
    picture(tmp_path / "b.png")
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
    items = source(tmp_path)
    found = captions(items)
    assert found.pop("f.png") in ("is a broken link", "has no caption")
    assert found == {"a.png": ("a",), "b.png": "has no caption"}
    assert set(notes(items)[image_folder.NOT_REGULAR]) == {
        "b.txt",
        "c.png",
        "d.png",
        "e.png",
        "sub/metadata.jsonl",
    }
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    assert unreadable(items, 0) == "is a pipe, not a file"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("0.TAR", 'holds no pictures.*read by training.dataset = "webdataset"'),
        ("0.arrow", 'holds no pictures.*read by training.dataset = "parquet"'),
        ("file.tar", 'is not a folder; training.dataset = "webdataset"'),
    ],
)
def test_what_is_no_folder_of_pictures_is_refused(tmp_path, file, message):
    (tmp_path / file).touch()
    refuses("folder", tmp_path / file if file == "file.tar" else tmp_path, message)


@pytest.mark.parametrize("watched", ["files", "directories"])
def test_changes_are_noticed(tmp_path, monkeypatch, watched):
    def rebuilt() -> bool:
        before = identities[-1]
        identities.append(source(tmp_path).index.identity)
        return identities[-1] != before

    if watched == "directories":
        monkeypatch.setattr(image_folder, "WATCHED_FILES", 2)
    picture(tmp_path / "a.png", "a")
    picture(tmp_path / "sub" / "b.png", "b")
    table = tmp_path / "sub" / "metadata.csv"
    table.write_text("file_name,text\nb.png,bee\n")
    identities = [source(tmp_path).index.identity]
    for change in (
        lambda: picture(tmp_path / "sub" / "c.png", "c"),
        lambda: (tmp_path / "a.png").unlink(),
        lambda: picture(tmp_path / "new" / "d.png", "d"),
        lambda: table.write_text("file_name,text\nb.png,boo\n"),
        lambda: shutil.rmtree(tmp_path / "new"),
    ):
        assert not rebuilt()
        change()
        assert rebuilt()
    assert captions(source(tmp_path)) == {"sub/b.png": ("boo",), "sub/c.png": ("c",)}
    # Of more than 200,000 files, edits in place are not looked for.
    (tmp_path / "sub" / "c.txt").write_text("sea")
    assert rebuilt() == (watched == "files")


@pytest.mark.parametrize("watched", [200_000, 0])
@pytest.mark.parametrize("where", [".", "index", "../index"])
def test_an_index_folder_inside_of_the_data_is_no_change_of_theirs(
    tmp_path, monkeypatch, where, watched
):
    monkeypatch.setattr(image_folder, "WATCHED_FILES", watched)
    root = tmp_path / "data"
    picture(root / "a.png", "a")
    first, second = (source(root, index_folder=root / where) for _ in range(2))
    assert list(tmp_path.rglob("*.arrow"))
    assert first.index.identity == second.index.identity
    assert ids(second) == ["a.png"]


def test_what_the_system_refuses_today_is_read_tomorrow(tmp_path, refused):
    for name in ("a.png", "b.png", "closed/c.png"):
        picture(tmp_path / name, name)
    refused |= {"a.png", "b.txt", "closed"}
    items = source(tmp_path)
    found = [(row.item_id, row.captions, row.width, row.reason) for row in rows(items)]
    assert found == [("a.png", ("a.png",), 0, ""), ("b.png", (), 11, "")]
    paths = {str(tmp_path / "b.txt"), str(tmp_path / "closed")}
    assert {path for path, _ in items.index.refused} == paths
    text = "files or folders that cannot be opened: Permission denied"
    assert set(notes(items)[text]) == paths
    assert unreadable(items, 0) == "Permission denied"
    assert source(tmp_path).index.identity == items.index.identity
    refused.discard("a.png")
    assert items[0].captions == ("a.png",)
    refused.clear()
    assert list(captions(source(tmp_path))) == ["a.png", "b.png", "closed/c.png"]


@pytest.mark.parametrize("name", ["metadata.jsonl", "root"])
def test_a_root_or_metadata_that_cannot_be_opened_is_refused(tmp_path, refused, name):
    picture(tmp_path / "root" / "a.png", "a")
    metadata(tmp_path / "root", {"file_name": "a.png", "text": "x"})
    refused.add(name)
    refuses("folder", tmp_path / "root", f"{name} cannot be opened: Permission denied")


@pytest.mark.parametrize(
    ("part_of", "part", "names"),
    [
        (part_of_folder, "train", ("train", "Train2017", "training_set")),
        (part_of_folder, "validation", ("val", "val_2017", "VALID", "dev")),
        (part_of_folder, "test", ("test-images", "evaluation")),
        (part_of_folder, "", ("trains", "test cars", "2017", "images", "train_val")),
        (part_of, "train", ("data/train-00000-of-00005.parquet",)),
        (part_of, "validation", ("val/0.tar",)),
        (part_of, "test", ("train/test.tar",)),
        (part_of, "", ("0.tar", "strain.tar")),
    ],
)
def test_names_of_parts(part_of, part, names):
    assert {part_of(name) for name in names} == {part}


@pytest.mark.parametrize(
    ("parts", "split", "both", "part", "shared", "left_out"),
    [
        ("train validation test -", "train", False, "train", False, [["test"], ["-"]]),
        ("train validation test -", "held_out", True, "validation", False, [["test"], ["-"]]),
        ("train test", "held_out", False, "test", False, []),
        ("train -", "held_out", False, "train", True, [["-"]]),
        ("train -", "held_out", True, "", True, []),
        ("-", "train", False, "", True, []),
    ],
)
def test_which_part_is_whose(parts, split, both, part, shared, left_out):
    names = {name: name.removeprefix("-") for name in parts.split()}
    own = split_files(names, split, "x", both)
    assert (own.part, own.shared) == (part, shared)
    assert own.names == ([part] if part else list(names))
    assert list(own.left_out.values()) == left_out
    with pytest.raises(ValueError, match="x has no train part, only test"):
        split_files({"test": "test"}, "train", "x")


def test_a_folder_of_parts(tmp_path):
    for name in ("train/cat/0", "train/1", "val/2", "other/4", "5"):
        picture(tmp_path / f"{name}.png", name)
    train = source(tmp_path)
    assert ids(train) == ["train/1.png", "train/cat/0.png"]
    assert list(notes(train).values()) == [("other", "5.png")]
    picture(tmp_path / "val/6.png", "")  # noticed by the part that it belongs to
    assert source(tmp_path).index.identity == train.index.identity
    assert len(indexed("folder", tmp_path, "held_out")) == 2


def test_parts_that_lie_deeper_are_noted(tmp_path):
    for name in ("images/train/0", "images/val/a/1", "b/2"):
        picture(tmp_path / f"{name}.png", name)
    assert notes(source(tmp_path)) == {image_folder.DEEPER_PARTS: ("images/train", "images/val")}


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
    assert sorted(ids(source(tmp_path))) == sorted(f"{name}.png" for name in names)
