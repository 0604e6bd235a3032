"""Which columns hold pictures and captions, however tables store them."""

import json
import os

import datasets
import pyarrow as pa
import pytest
from data_files import indexed, png, write_parquet

from torchtitan_flux.data.sources.captions import NO_CAPTION
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.source import UnreadableItem


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def source(path, **options) -> IndexedSource:
    return indexed("parquet", path, **options)


def items(found: IndexedSource) -> list[tuple]:
    """(shade, captions), or the reason why there are none."""
    read = []
    for i in range(len(found)):
        try:
            item = found[i]
            read.append((item.image.getpixel((0, 0)), item.captions))
        except UnreadableItem as error:
            read.append(error.reason)
    return read


PICTURES = [png(i) for i in range(3)]
STRUCTS = [{"bytes": data, "path": None} for data in PICTURES]
TEXTS = ["a", "b", "c"]
WANTED = [(0, ("a",)), (1, ("b",)), (2, ("c",))]

IMAGES = {
    "binary": pa.array(PICTURES, pa.binary()),
    "large_binary": pa.array(PICTURES, pa.large_binary()),
    "binary_view": pa.array(PICTURES, pa.binary_view()),
    "struct": pa.array(STRUCTS, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    "struct of views": pa.array(
        STRUCTS, pa.struct([("path", pa.string_view()), ("bytes", pa.binary_view())])
    ),
    "struct of bytes": pa.array(STRUCTS, pa.struct([("bytes", pa.large_binary())])),
    "list of one": pa.array([[data] for data in PICTURES], pa.list_(pa.binary())),
    "large list of one": pa.array([[s] for s in STRUCTS], pa.large_list(
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    "fixed list of one": pa.array([[data] for data in PICTURES], pa.list_(pa.binary(), 1)),
}  # fmt: skip
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
        write_parquet(path, dict(zip(table.column_names, table.columns, strict=True)))
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    found = source(path)
    assert items(found) == WANTED
    rows = [found.index[i] for i in range(3)]
    assert [(row.item_id, row.width, row.height, row.length) for row in rows] == [
        (f"a.{suffix}/{i}", 5, 3, len(PICTURES[i])) for i in range(3)
    ]


def test_names_in_another_case(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"Image": PICTURES, "TEXT": TEXTS, "URL": TEXTS})
    assert items(source(path)) == WANTED
    assert items(source(path, image_column="image", caption_column="url")) == WANTED
    exact = {"IMAGE": [b""] * 3, "image": PICTURES, "Text": ["x"] * 3, "caption": TEXTS}
    assert items(source(write_parquet(tmp_path / "b.parquet", exact))) == WANTED
    unclear = {"IMAGE": PICTURES, "Image": PICTURES, "text": TEXTS}
    with pytest.raises(ValueError, match="one of IMAGE, Image has to be named"):
        source(write_parquet(tmp_path / "c.parquet", unclear))


def test_fields_within_columns(tmp_path):
    records = [{"caption": text, "alt": [{"Text": text}, {"Text": "also"}]} for text in TEXTS]
    columns = {
        "sample": [{"jpg": data, "n": 1} for data in PICTURES],
        "json": records,
        "raw": [json.dumps({"deep": {"caption": text}}) for text in TEXTS],
        "ratio": [0.1, 0.2, 0.3],
        "broken": ["{", "[]", '{"caption": "c"}'],
    }
    path = write_parquet(tmp_path / "a.parquet", columns)
    named = {"image_column": "sample.jpg"}
    assert items(source(path, caption_column="json.caption", **named)) == WANTED
    assert items(source(path, caption_column="JSON.Caption", **named)) == WANTED
    alternatives = [(i, (text, "also")) for i, text in enumerate(TEXTS)]
    assert items(source(path, caption_column="json.alt.text", **named)) == alternatives
    assert items(source(path, caption_column="raw.deep.caption", **named)) == WANTED
    assert items(source(path, caption_column="broken.caption", **named)) == [
        "its record is no JSON",
        NO_CAPTION,
        WANTED[2],
    ]
    for options, message in (
        (named, "no column is called text, .*json.caption, json.alt, json.alt.Text"),
        ({"caption_column": "raw"}, "no column holds images; .*sample.jpg"),
        ({"caption_column": "json.url", **named}, "caption_column: there is no column 'json.url'"),
        ({"caption_column": "ratio", **named}, "column 'ratio' holds no text"),
        ({"image_column": "sample.n"}, "image_column: column 'sample.n' holds no encoded images"),
    ):
        with pytest.raises(ValueError, match=message):
            source(path, **options)
    dotted = {"image": PICTURES, "json.caption": TEXTS}
    path = write_parquet(tmp_path / "b.parquet", dotted)
    assert items(source(path, caption_column="json.caption")) == WANTED


def test_a_list_of_several_pictures_is_unreadable(tmp_path):
    lists = {"images": [PICTURES[:1], PICTURES[:2], [], None], "text": ["a", "b", "c", "d"]}
    found = source(write_parquet(tmp_path / "a.parquet", lists))
    several = "holds a list of 2 images, not one"
    assert items(found) == [WANTED[0], several, "has no image", "has no image"]
    assert [found.index[i].reason for i in range(4)] == [
        "",
        several,
        "has no image",
        "has no image",
    ]
    # One that is no list is preferred, as it was when lists were not read.
    both = lists | {"photo": [*PICTURES, PICTURES[0]]}
    assert items(source(write_parquet(tmp_path / "b.parquet", both)))[1] == (1, ("b",))


def test_captions_are_whole_unless_lines_are_asked_for(tmp_path):
    texts = ["one\ntwo\n\nthree", ["a\nb", "c"], ["d"]]
    path = write_parquet(
        tmp_path / "a.parquet", {"image": PICTURES, "text": [texts[:1], *texts[1:]]}
    )
    found = source(path)
    assert [found[i].captions for i in range(2)] == [("one\ntwo\n\nthree",), ("a\nb", "c")]
    found = source(path, captions_by_line=True)
    assert [found[i].captions for i in range(2)] == [("one", "two", "three"), ("a", "b", "c")]


def test_without_captions_where_that_is_said(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"image": PICTURES, "label": [1, 2, 3]})
    with pytest.raises(ValueError, match="no column is called"):
        source(path)
    found = source(path, default_caption="")
    assert items(found) == [(i, ("",)) for i in range(3)]
    assert found.usable_rows.all()
    with pytest.raises(ValueError, match="no column 'text'"):
        source(path, default_caption="", caption_column="text")


def test_paths_stay_within_the_folder(tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(png(9))
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "deep" / "beside.png").write_bytes(png(8))
    os.mkfifo(data / "pipe.png")
    (data / "zero.png").symlink_to("/dev/zero")
    paths = [
        "deep/../deep/beside.png",
        str(outside),
        "../outside.png",
        "pipe.png",
        "zero.png",
        "deep",
    ]
    path_only = pa.array(
        [{"bytes": None, "path": path} for path in paths],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    found = source(write_parquet(data / "a.parquet", {"image": path_only, "text": ["x"] * 6}))
    read = items(found)
    assert read[0] == (8, ("x",))
    reasons = [
        "not relative",
        "is outside of the folder",
        "is a pipe",
        "is a device",
        "is a folder",
    ]
    for number, reason in enumerate(reasons, 1):
        assert reason in read[number], number
        assert found.index[number].reason == read[number]
    assert list(found.usable_rows) == [True] + [False] * 5


def test_text_that_is_not_utf8_is_the_row_s_own_trouble(tmp_path):
    texts = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    found = source(write_parquet(tmp_path / "a.parquet", {"image": PICTURES, "text": texts}))
    read = items(found)
    assert read[::2] == WANTED[::2]
    assert "UnicodeDecodeError" in read[1]
