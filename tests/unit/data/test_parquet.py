"""Tables of pictures: every way they are stored, columns, splits, damage, the index, workers."""

import io
import json
import multiprocessing
import os
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import (
    captions,
    indexed,
    notes,
    png,
    refuses,
    rows,
    write_parquet,
)
from PIL import Image

from torchtitan_flux.data.decode import header_size
from torchtitan_flux.data.sources.captions import NO_CAPTION
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import Source, SourceOptions, UnreadableItem


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where the index of the hub's tables is


def columns(first: int, last: int, **more) -> dict:
    pictures = [{"bytes": png(i), "path": None} for i in range(first, last)]
    return {"image": pictures, "text": [f"number {i}" for i in range(first, last)]} | more


def source(path, split="train", name="parquet", **options) -> IndexedSource:
    return indexed(name, path, split, **options)


def item(found: Source, index: int) -> tuple | str:
    """(shade, captions), or the reason why there are none."""
    try:
        read = found[index]
    except UnreadableItem as error:
        return error.reason
    return np.asarray(read.image).max(), read.captions


def items(found: Source) -> list[tuple | str]:
    return [item(found, index) for index in range(len(found))]


def numbers(first: int, last: int) -> list:
    return [(i, (f"number {i}",)) for i in range(first, last)]


def as_dataset(first: int, last: int) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(columns(first, last), features)


PICTURES = [png(i) for i in range(3)]
STRUCTS = [{"bytes": data, "path": None} for data in PICTURES]
TEXTS = ["a", "b", "c"]
WANTED = [(0, ("a",)), (1, ("b",)), (2, ("c",))]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
VIEWS = pa.struct([("path", pa.string_view()), ("bytes", pa.binary_view())])
IMAGES = {
    "binary": pa.array(PICTURES, pa.binary()),
    "large_binary": pa.array(PICTURES, pa.large_binary()),
    "binary_view": pa.array(PICTURES, pa.binary_view()),
    "struct": pa.array(STRUCTS, STRUCT),
    "struct of views": pa.array(STRUCTS, VIEWS),
    "struct of bytes": pa.array(STRUCTS, pa.struct([("bytes", pa.large_binary())])),
    "list of one": pa.array([[data] for data in PICTURES], pa.list_(pa.binary())),
    "large list of one": pa.array([[s] for s in STRUCTS], pa.large_list(STRUCT)),
    "fixed list of one": pa.array([[data] for data in PICTURES], pa.list_(pa.binary(), 1)),
}
CAPTIONS = {
    "string": pa.array(TEXTS, pa.string()),
    "large_string": pa.array(TEXTS, pa.large_string()),
    "string_view": pa.array(TEXTS, pa.string_view()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "list": pa.array([[text] for text in TEXTS], pa.list_(pa.string_view())),
    "large_list": pa.array([[text] for text in TEXTS], pa.large_list(pa.large_string())),
}


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("image", "text"),
    [*((image, "string") for image in IMAGES), *(("binary", text) for text in CAPTIONS)],
)
def test_every_type_that_stores_the_same(tmp_path, image, text, suffix):
    table = pa.table({"image": IMAGES[image], "text": CAPTIONS[text]})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    found = source(path)
    assert items(found) == WANTED
    wanted = [(f"a.{suffix}/{i}", len(PICTURES[i]), 5, 3) for i in range(3)]
    assert [(row.item_id, row.length, row.width, row.height) for row in rows(found)] == wanted


NESTED = {
    "sample": [{"jpg": data, "n": 1} for data in PICTURES],
    "json": [{"caption": text, "alt": [{"Text": text}, {"Text": "also"}]} for text in TEXTS],
    "raw": [json.dumps({"deep": {"caption": text}}) for text in TEXTS],
    "broken": ["{", "[]", '{"caption": "c"}'],
    "ratio": [0.1, 0.2, 0.3],
}


BROKEN = ["its record is no JSON", NO_CAPTION, WANTED[2]]
TWO = {"a": PICTURES, "b": PICTURES, "text": TEXTS}
UPPER = {"Image": PICTURES, "TEXT": TEXTS, "URL": ["u"] * 3}
EXACT = {"IMAGE": [b""] * 3, "image": PICTURES, "Text": ["x"] * 3, "caption": TEXTS}
SAME = {"IMAGE": PICTURES, "Image": PICTURES, "text": TEXTS}
DOTTED = {"image": PICTURES, "json": [{"caption": "x"}] * 3, "json.caption": TEXTS}


@pytest.mark.parametrize(
    ("table", "image", "caption", "wanted"),
    [
        (UPPER, "", "", WANTED),
        (UPPER, "image", "url", [(i, ("u",)) for i in range(3)]),
        (EXACT, "", "", WANTED),
        (SAME, "", "", "image_column: one of IMAGE, Image has to be named"),
        (TWO, "", "", "image_column: one of a, b has to be named"),
        (DOTTED, "", "json.caption", WANTED),
        (NESTED, "sample.jpg", "json.caption", WANTED),
        (NESTED, "sample.jpg", "JSON.Caption", WANTED),
        (NESTED, "sample.jpg", "raw.deep.caption", WANTED),
        (NESTED, "sample.jpg", "json.alt.text", [(i, (t, "also")) for i, t in enumerate(TEXTS)]),
        (NESTED, "sample.jpg", "broken.caption", BROKEN),
        (
            NESTED,
            "sample.jpg",
            "json.url",
            "caption_column: there is no column 'json.url'; the",
        ),
        (NESTED, "sample.jpg", "ratio", "caption_column: column 'ratio' holds no text"),
        (NESTED, "sample.jpg", "", "caption_column: no column is called text, .*json.caption"),
        (NESTED, "", "", "image_column: no column holds images; .*sample.jpg"),
        (NESTED, "sample.n", "", "image_column: column 'sample.n' holds no encoded images"),
        (NESTED, "jpg", "", "image_column: there is no column 'jpg'; the columns are sample"),
        (NESTED, "raw.jpg", "", "image_column: column 'raw.jpg' holds no encoded images"),
    ],
)
def test_columns_and_fields_within_them(tmp_path, table, image, caption, wanted):
    path = write_parquet(tmp_path / "a.parquet", table)
    options = {"image_column": image, "caption_column": caption}
    if isinstance(wanted, str):
        refuses("parquet", path, rf"data\.{wanted}", **options)
    else:
        assert items(source(path, **options)) == wanted


def test_a_list_of_several_pictures_is_unreadable(tmp_path):
    lists = {"images": [PICTURES[:1], PICTURES[:2], [], None], "text": [*TEXTS, "d"]}
    found = source(write_parquet(tmp_path / "a.parquet", lists))
    reasons = ["holds a list of 2 images, not one", "has no image", "has no image"]
    assert items(found) == [WANTED[0], *reasons]
    assert [row.reason for row in rows(found)] == ["", *reasons]
    both = lists | {"photo": [*PICTURES, PICTURES[0]]}  # one that is no list is preferred
    assert items(source(write_parquet(tmp_path / "b.parquet", both)))[1] == WANTED[1]


def test_several_captions_and_none(tmp_path):
    texts = [["a", " ", "b\nc"], ["d"], None]
    table = {"image": PICTURES, "text": texts, "label": [7, 8, 9]}
    path = write_parquet(tmp_path / "a.parquet", table)
    assert items(source(path)) == [(0, ("a", "b\nc")), (1, ("d",)), NO_CAPTION]
    assert items(source(path, captions_by_line=True))[0] == (0, ("a", "b", "c"))
    assert items(source(path, default_caption="none"))[2] == (2, ("none",))
    without = write_parquet(tmp_path / "b.parquet", {"image": PICTURES, "label": [7, 8, 9]})
    found = source(without, default_caption="")
    assert items(found) == [(i, ("",)) for i in range(3)]
    assert found.usable_rows.all()
    refuses("parquet", without, "no column 'text'", default_caption="", caption_column="text")
    assert items(source(without, caption_column="label"))[2] == (2, ("9",))


@pytest.mark.parametrize("from_hub", [False, True])
def test_mnist(tmp_path, monkeypatch, from_hub):
    """The layout of ylecun/mnist: captions are the names of the classes."""
    label = datasets.ClassLabel(names=[*"0123456", "seven", "8", "9"])
    features = datasets.Features({"image": datasets.Image(), "label": label})
    parts = {}
    for part, first in (("train", 0), ("test", 3)):
        table = columns(first, first + 3, label=[7, 0, 9])
        del table["text"]
        parts[part] = datasets.Dataset.from_dict(table, features)
        parts[part].to_parquet(tmp_path / "mnist" / f"{part}-00000-of-00001.parquet")
    path = tmp_path
    if from_hub:
        path = None
        monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(parts))
    for split, first in (("train", 0), ("held_out", 3)):
        found = build_source("mnist", split, SourceOptions(path=path and str(path)))
        words = [f"a handwritten digit {name}" for name in ("seven", "0", "9")]
        assert items(found) == [(first + i, (text,)) for i, text in enumerate(words)]
    monkeypatch.undo()
    assert item(source(tmp_path, caption_column="label"), 0) == (0, ("seven",))


def test_pictures_beside_the_table_stay_within_its_folder(tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(png(9))
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "deep" / "beside.png").write_bytes(png(8))
    os.mkfifo(data / "pipe.png")
    (data / "zero.png").symlink_to("/dev/zero")
    reasons = {
        "deep/../deep/beside.png": "",
        "deep\\beside.png": "",
        str(outside): "not relative",
        "../outside.png": "is outside of the folder",
        "pipe.png": "is a pipe",
        "zero.png": "is a device",
        "deep": "is a folder",
        "missing.png": "missing.png: does not exist",
        "": "has no image",
    }
    paths = pa.array([{"bytes": None, "path": path} for path in reasons], STRUCT)
    found = source(write_parquet(data / "a.parquet", {"image": paths, "text": ["x"] * 9}))
    for number, (path, reason) in enumerate(reasons.items()):
        assert item(found, number) == (8, ("x",)) if not reason else reason in item(found, number)
        assert reason in found.index[number].reason, path
    assert list(found.usable_rows) == [True, True] + [False] * 7
    with pytest.raises(IndexError):
        found[9]


def test_headers_are_what_they_are_in_files(tmp_path):
    pictures = [b"", b"<html>", b"no image"]
    for format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "TGA", "ICO", "PPM"):
        file = io.BytesIO()
        sizes = {"sizes": [(32, 20)]} if format == "ICO" else {}
        Image.new("RGB", (32, 20)).save(file, format, **sizes)
        pictures += [file.getvalue(), file.getvalue()[:40]]
    long = io.BytesIO()  # its header ends beyond what is read first
    Image.new("RGB", (32, 20)).save(long, "TIFF", tiffinfo={270: "x" * 2**17})
    Image.effect_noise((300, 300), 99).save(file, "TIFF")  # and so does this one
    pictures += [long.getvalue(), file.getvalue()]
    expected = [header_size(io.BytesIO(data)) for data in pictures]
    table = {"image": pictures, "text": ["x"] * len(pictures)}
    found = source(write_parquet(tmp_path / "a.parquet", table))
    assert [(row.width, row.height, row.reason) for row in rows(found)] == expected
    assert sum(size[0] >= 32 for size in expected) >= 11


def test_text_that_is_not_utf8_is_the_row_s_own_trouble(tmp_path):
    texts = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    read = items(source(write_parquet(tmp_path / "a.parquet", {"image": PICTURES, "text": texts})))
    assert read[::2] == WANTED[::2]
    assert "UnicodeDecodeError" in read[1]


def test_folder_of_parquet_files(tmp_path):
    write_parquet(tmp_path / "b.parquet", columns(3, 7))
    write_parquet(tmp_path / "a" / "0.parquet", columns(7, 9))
    write_parquet(tmp_path / "A.PARQUET", columns(0, 3, width=[1, 2, 3]))  # which is not read
    nulls = {"text": pa.nulls(1), "n": ["x"], "image": [STRUCTS[0]]}
    write_parquet(tmp_path / "z" / "0.parquet", nulls)
    found = source(tmp_path)
    assert items(found) == [*numbers(0, 9), NO_CAPTION]
    names = [rows(found)[i].item_id for i in (0, 3, 6, 8)]
    assert names == ["A.PARQUET/0", "b.parquet/0", "b.parquet/3", "a/0.parquet/1"]


def test_saved_folders_and_arrow_files(tmp_path):
    as_dataset(0, 4).save_to_disk(tmp_path / "saved")
    found = source(tmp_path / "saved")
    assert items(found) == numbers(0, 4)
    assert found[2].item_id == "saved/2"
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    assert items(source(arrow)) == numbers(0, 4)
    parts = {"train": as_dataset(0, 4), "unsupervised": as_dataset(0, 1), "test": as_dataset(4, 6)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "dict")
    found = source(tmp_path / "dict")
    assert items(pickle.loads(pickle.dumps(found))) == numbers(0, 4)
    assert items(source(tmp_path / "dict", "held_out")) == numbers(4, 6)
    assert ("unsupervised",) in notes(found).values()
    assert source(tmp_path / "dict").index.identity == found.index.identity


def test_only_a_held_out_part(tmp_path):
    write_parquet(tmp_path / "validation.parquet", columns(0, 2))
    pq.write_table(pa.table(columns(0, 1)).slice(0, 0), tmp_path / "validation-2.parquet")
    found = source(tmp_path, "held_out")
    assert items(found) == numbers(0, 2)
    assert notes(found) == {"tables without rows": ("validation-2.parquet",)}
    refuses("parquet", tmp_path, r"training\.dataset_path: .* no train part, only valid")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"image": STRUCTS[:1], "caption": ["x"]}, r"b\.parquet has no column 'text'"),
        ({"image": STRUCTS[:1], "text": [3]}, r"column 'text' is int64 in b\.parquet, string in a"),
        ({"image": ["x"], "text": ["y"]}, r"column 'image' is string in b\.parquet, struct"),
    ],
)
def test_a_used_column_that_differs_is_named_with_its_file(tmp_path, second, message):
    write_parquet(tmp_path / "a.parquet", columns(0, 1))
    write_parquet(tmp_path / "b.parquet", second)
    refuses("parquet", tmp_path, message)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("content", [b"", b"<html>", b"PAR1 and nothing"])
def test_what_is_no_table_is_named(tmp_path, content, suffix):
    write_parquet(tmp_path / "0.parquet", columns(0, 1))
    (tmp_path / f"1.{suffix}").write_bytes(content)
    for path in (tmp_path, tmp_path / f"1.{suffix}"):
        refuses(
            "parquet", path, rf"/1\.{suffix} (is empty|is a web|cannot be read as|is a parquet)"
        )


def test_what_cannot_be_read_is_refused(tmp_path, refused):
    file = write_parquet(tmp_path / "a" / "0.parquet", columns(0, 1))
    for name, make, message in (
        ("1.parquet", os.mkfifo, "1.parquet is a pipe"),
        ("2.parquet", lambda path: path.symlink_to("nowhere"), "cannot be opened: No such file"),
        ("3.parquet.gz", lambda path: path.touch(), "3.parquet.gz is compressed: unpack it"),
    ):
        make(tmp_path / "a" / name)
        refuses("parquet", tmp_path, message)
        (tmp_path / "a" / name).unlink()
    pq.write_table(pa.table(columns(0, 1)).slice(0, 0), file)
    refuses("parquet", tmp_path, "holds no row")
    as_dataset(0, 2).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    refuses("parquet", tmp_path / "saved", r"\.arrow cannot be opened: No such file")
    refused.add("a")
    refuses("parquet", tmp_path, "/a cannot be opened: Permission denied")


def test_groups_without_rows(tmp_path):
    table = pa.table(columns(0, 3))
    with pq.ParquetWriter(tmp_path / "0.parquet", table.schema) as writer:
        for start, count in (0, 0), (0, 2), (0, 0), (2, 1):
            writer.write_table(table.slice(start, count))
    assert items(source(tmp_path)) == numbers(0, 3)


def test_no_bars_of_datasets_are_shown(tmp_path, capfd):
    datasets.enable_progress_bars()
    source(write_parquet(tmp_path / "0.parquet", columns(0, 3)))
    assert "examples/s" not in "".join(capfd.readouterr())


def _count(arguments) -> int:
    path, index_folder = arguments
    return len(source(path, index_folder=index_folder))


def test_several_processes_at_once(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", columns(0, 200))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_count, [(file, tmp_path / "index")] * 4) == [200] * 4


def test_the_hub(monkeypatch):
    parts = datasets.DatasetDict({"train": as_dataset(0, 4), "test": as_dataset(4, 6)})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: parts)
    assert items(source("someone/pictures")) == numbers(0, 4)
    assert list(captions(source("someone/pictures", "held_out"))) == ["test/0", "test/1"]

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = r"neither here nor available .*reach the Hub\); download it with `hf download someone"
    refuses("parquet", "someone/pictures", message)
    for name in ("-x/y", "owner/..", "owner/na--me"):  # no name of the hub's: it is not asked
        refuses("parquet", name, f"{name} does not exist")


def test_coco(tmp_path):
    refuses("coco-validation", None, r"dataset_path: .*download howard-hou/COCO-Text")
    table = {"image": PICTURES, "caption": [[f"first {i}", f"second {i}"] for i in range(3)]}
    for name in ("train", "validation"):
        write_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet", table)
    found = captions(source(tmp_path, "held_out", "coco-validation"))
    part = "validation"
    assert found[f"data/{part}-00000-of-00001.parquet/1"] == ("first 1", "second 1")
