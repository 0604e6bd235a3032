"""Which files are tables, which rows of them are read, and the index of those."""

import errno
import io
import os
import pickle

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import indexed, png, write_parquet
from PIL import Image

from torchtitan_flux.data.decode import header_size
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import SourceOptions, Split
from torchtitan_flux.data.sources.split import SourcePart


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def columns(count: int, **more) -> dict:
    return {"image": [png(i) for i in range(count)], "text": [str(i) for i in range(count)]} | more


def source(path, split: Split = "train", **options) -> IndexedSource:
    return indexed("parquet", path, split, **options)


def notes(found: IndexedSource) -> dict[str, tuple[str, ...]]:
    return {note.text: note.examples for note in found.index.notes}


def test_columns_that_are_not_used_do_not_matter(tmp_path):
    write_parquet(tmp_path / "a.parquet", columns(2))
    write_parquet(tmp_path / "b.parquet", columns(2, width=[1, 2], json=[{"a": 1}, {"a": 2}]))
    write_parquet(tmp_path / "c.parquet", {"text": pa.nulls(1), "n": ["x"], "image": [png(1)]})
    found = source(tmp_path)
    assert [found.index[i].item_id for i in (0, 2, 4)] == [
        "a.parquet/0",
        "b.parquet/0",
        "c.parquet/0",
    ]
    assert [found[i].captions for i in range(4)] == [("0",), ("1",), ("0",), ("1",)]
    assert found.index[4].reason == "has no caption"


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"image": [png()], "caption": ["x"]},
            r"b\.parquet has no column 'text', it should be one",
        ),
        (
            {"image": [png()], "text": [3]},
            r"column 'text' is int64 in b\.parquet, string in a\.parquet",
        ),
        ({"image": ["x"], "text": ["y"]}, "column 'image' is string in b.parquet, large_binary"),
    ],
)
def test_a_used_column_that_differs_is_named_with_its_file(tmp_path, second, message):
    write_parquet(tmp_path / "a.parquet", columns(1))
    write_parquet(tmp_path / "b.parquet", second)
    with pytest.raises(ValueError, match=r"training\.dataset_path: .*" + message):
        source(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer, run `git lfs"),
        (b"\x1f\x8b\x08\0", "is gzip under another name: unpack"),
        (b"<!doctype html>", "is a web page"),
        (b"ARROW1\0\0", r"is an Arrow file for random access \(Feather\)"),
    ],
)
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_what_is_no_table_is_named(tmp_path, content, message, suffix):
    write_parquet(tmp_path / "0.parquet", columns(1))
    (tmp_path / f"1.{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"training\.dataset_path: .*1\.{suffix} {message}"):
        source(tmp_path)


def test_suffixes_count_in_any_case_and_compressed_tables_are_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", columns(1))
    write_parquet(tmp_path / "B.PARQUET", columns(2))
    found = source(tmp_path)
    assert [found.index[i].item_id for i in range(3)] == [
        "B.PARQUET/0",
        "B.PARQUET/1",
        "a.parquet/0",
    ]
    (tmp_path / "c.parquet.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"c\.parquet\.gz is compressed: unpack it"):
        source(tmp_path)
    with pytest.raises(ValueError, match=r"training\.dataset_path: .*File name too long"):
        source(tmp_path / ("x" * 300))


def test_pipes_and_broken_links_are_refused(tmp_path):
    write_parquet(tmp_path / "0.parquet", columns(1))
    os.mkfifo(tmp_path / "1.parquet")
    for path in (tmp_path, tmp_path / "1.parquet"):
        with pytest.raises(ValueError, match=r"1\.parquet .*it is a pipe"):
            source(path)
    (tmp_path / "1.parquet").unlink()
    (tmp_path / "1.parquet").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"1\.parquet cannot be opened: No such file"):
        source(tmp_path)


def test_folders_that_are_not_listed_are_refused(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a" / "0.parquet", columns(1))
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/a"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        ValueError, match=r"training\.dataset_path: .*/a cannot be opened: Permission"
    ):
        source(tmp_path)


def test_files_that_are_not_read_are_noted(tmp_path):
    for name in ("train-0", "validation-0", "test-0", "extra"):
        write_parquet(tmp_path / f"{name}.parquet", columns(1))
    pq.write_table(pa.table(columns(1)).slice(0, 0), tmp_path / "train-1.parquet")
    found = source(tmp_path)
    assert [found.index[i].item_id for i in range(len(found))] == ["train-0.parquet/0"]
    assert sorted(notes(found).values()) == [
        ("extra.parquet",),
        ("test-0.parquet",),
        ("train-1.parquet",),
    ]
    assert source(tmp_path, "held_out").index[0].item_id == "validation-0.parquet/0"


def test_a_kept_index_is_used_until_a_file_changes(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "a.parquet", columns(3))
    first = source(tmp_path)
    assert source(tmp_path).index.identity == first.index.identity
    assert first.digest == source(tmp_path).digest
    by_line = source(tmp_path, captions_by_line=True)
    assert by_line.index.identity != first.index.identity
    assert source(tmp_path).index.identity == first.index.identity  # one does not replace the other
    write_parquet(file, columns(3))
    os.utime(file, ns=(1, 1))
    again = source(tmp_path)
    assert again.index.identity != first.index.identity
    assert again.digest == first.digest  # the same ids
    monkeypatch.setattr("torchtitan_flux.data.sources.index_cache.formats", lambda: ("HEIF",))
    assert source(tmp_path).index.identity != again.index.identity
    write_parquet(file, columns(4))
    assert source(tmp_path).digest != first.digest


def test_headers_are_in_the_index_and_only_readable_rows_are_held_out(tmp_path):
    large = io.BytesIO()
    Image.new("RGB", (40, 30)).save(large, "JPEG")
    pictures = [large.getvalue(), b"", b"<html>", png(), *(png(i) for i in range(6))]
    texts = ["x"] * 3 + [""] + ["x"] * 6
    file = write_parquet(tmp_path / "a.parquet", {"image": pictures, "text": texts})
    found = source(file)
    rows = [found.index[i] for i in range(10)]
    assert [(row.width, row.height) for row in rows[:5]] == [
        (40, 30),
        (0, 0),
        (0, 0),
        (5, 3),
        (5, 3),
    ]
    assert [bool(row.captions) for row in rows[:5]] == [True, True, True, False, True]
    assert list(found.usable_rows) == [True, False, False, False] + [True] * 6
    options = SourceOptions(path=str(file), held_out_share=0.6)
    held_out = build_source("parquet", "held_out", options)
    assert isinstance(held_out, SourcePart)
    assert len(held_out) == 6
    assert not {f"a.parquet/{i}" for i in (1, 2, 3)} & {item.item_id for item in held_out}
    with pytest.raises(ValueError, match="has no validation or test part"):
        build_source(
            "parquet", "held_out", SourceOptions(path=str(file), validates_training_data=True)
        )


def test_headers_are_what_they_are_in_files(tmp_path):
    pictures = []
    for format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "TGA", "ICO", "PPM"):
        file = io.BytesIO()
        Image.new("RGB", (32, 20)).save(
            file, format, **{"sizes": [(32, 20)]} if format == "ICO" else {}
        )
        pictures += [file.getvalue(), file.getvalue()[:40]]
    expected = [header_size(io.BytesIO(data)) for data in pictures]
    texts = ["x"] * len(pictures)
    found = source(write_parquet(tmp_path / "a.parquet", {"image": pictures, "text": texts}))
    assert [found.index[i][4:6] for i in range(len(found))] == [size[:2] for size in expected]
    assert [found.index[i].reason for i in range(len(found))] == [size[2] for size in expected]
    assert sum(size[0] == 32 for size in expected) >= 9


def test_saved_folders_have_an_index_too(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    values = columns(3) | {"image": [{"bytes": png(i), "path": None} for i in range(3)]}
    part = datasets.Dataset.from_dict(values, features)
    datasets.DatasetDict({"train": part, "unsupervised": part, "test": part}).save_to_disk(
        tmp_path / "d"
    )
    found = source(tmp_path / "d")
    assert [found.index[i].item_id for i in range(3)] == ["train/0", "train/1", "train/2"]
    assert pickle.loads(pickle.dumps(found))[2].image.getpixel((0, 0)) == 2
    assert ("unsupervised",) in notes(found).values()
    assert source(tmp_path / "d").index.identity == found.index.identity
