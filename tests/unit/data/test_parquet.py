"""Tables of pictures: every way they are stored, columns, splits, damage, the index, workers."""

import multiprocessing
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


TWO = {"a": PICTURES, "b": PICTURES, "text": TEXTS, "ratio": [0.1, 0.2, 0.3]}
UPPER = {"Image": PICTURES, "TEXT": TEXTS, "URL": ["u"] * 3}
EXACT = {"IMAGE": [b""] * 3, "image": PICTURES, "Text": ["x"] * 3, "caption": TEXTS}
SAME = {"IMAGE": PICTURES, "Image": PICTURES, "text": TEXTS}


@pytest.mark.parametrize(
    ("table", "image", "caption", "wanted"),
    [
        (UPPER, "", "", WANTED),
        (UPPER, "image", "url", [(i, ("u",)) for i in range(3)]),
        (EXACT, "", "", WANTED),
        (SAME, "", "", "image_column: 'image' has to be one column .* that do: IMAGE, Image;"),
        (TWO, "", "", "image_column: 'image' has to be one .* images; those that do: a, b; all"),
        (TWO, "ratio", "", "image_column: 'ratio' has to be one column that holds encoded images"),
        (TWO, "a", "ratio", "caption_column: 'ratio' has to be one column that holds text"),
        (TWO, "a", "url", "caption_column: 'url' has to be .* all columns: a, b, text, ratio"),
        ({"image": PICTURES}, "", "", "caption_column: 'text' or 'caption' .* that do: none; all"),
    ],
)
def test_columns(tmp_path, table, image, caption, wanted):
    path = write_parquet(tmp_path / "a.parquet", table)
    options = {"image_column": image, "caption_column": caption}
    if isinstance(wanted, str):
        refuses("parquet", path, rf"data\.{wanted}", **options)
    else:
        assert items(source(path, **options)) == wanted


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
    refuses("parquet", without, "'text' has to be", default_caption="", caption_column="text")
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


def test_a_missing_picture_and_text_that_is_not_utf8_are_the_row_s_own_trouble(tmp_path):
    texts = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    table = {"image": [*PICTURES[:2], None], "text": texts}
    read = items(source(write_parquet(tmp_path / "a.parquet", table)))
    assert read[::2] == [WANTED[0], "has no image"]
    assert "UnicodeDecodeError" in read[1]


def test_folder_of_parquet_files(tmp_path):
    write_parquet(tmp_path / "b.parquet", columns(3, 7))
    write_parquet(tmp_path / "a" / "0.parquet", columns(7, 9))
    write_parquet(tmp_path / "A.PARQUET", columns(0, 3, width=[1, 2, 3]))  # which is not read
    found = source(tmp_path)
    assert items(found) == numbers(0, 9)
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
        ({"image": STRUCTS[:1], "caption": ["x"]}, r"b\.parquet has 0 columns 'text'"),
        ({"image": STRUCTS[:1], "text": [3]}, r"'text' is int64 in b\.parquet, string before"),
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
        message = rf"/1\.{suffix} (is empty|is a web|cannot be read as|is a parquet)"
        refuses("parquet", path, message)


def test_what_cannot_be_read_is_refused(tmp_path, refused):
    (tmp_path / "tables").mkdir()
    file = write_parquet(tmp_path / "a" / "0.parquet", columns(0, 1))
    for name, make, message in (
        ("2.parquet", lambda path: path.symlink_to("nowhere"), "2.parquet is a broken link"),
        ("3.parquet.gz", lambda path: path.touch(), "3.parquet.gz is compressed: unpack it"),
    ):
        make(tmp_path / "a" / name)
        refuses("parquet", tmp_path, message)
        (tmp_path / "a" / name).unlink()
    pq.write_table(pa.table(columns(0, 1)).slice(0, 0), file)
    refuses("parquet", tmp_path, "holds no row")
    as_dataset(0, 2).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    refuses("parquet", tmp_path / "saved", r"saved cannot be read as a table.*No such file")
    refused.add("tables")
    refuses("parquet", tmp_path / "tables", "tables cannot be opened: Permission denied")


def test_groups_without_rows(tmp_path):
    table = pa.table(columns(0, 3))
    with pq.ParquetWriter(tmp_path / "0.parquet", table.schema) as writer:
        for start, count in (0, 0), (0, 2), (0, 0), (2, 1):
            writer.write_table(table.slice(start, count))
    assert items(source(tmp_path)) == numbers(0, 3)


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
