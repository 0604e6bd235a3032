"""Tables of pictures: every way they are stored, columns, splits, damage, workers."""

import multiprocessing
import os
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import png, write_parquet

from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import Source, SourceOptions, UnreadableItem


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setenv(
        "HOME", str(tmp_path / "home")
    )  # where the index of tables in memory is kept


def rows(first: int, last: int, **columns) -> dict:
    return {
        "image": [{"bytes": png(i), "path": None} for i in range(first, last)],
        "text": [f"number {i}" for i in range(first, last)],
    } | columns


def contents(source: Source) -> list[tuple[int, tuple[str, ...]]]:
    items = [source[i] for i in range(len(source))]
    return [(np.asarray(item.image).max(), item.captions) for item in items]


def numbers(first: int, last: int) -> list:
    return [(i, (f"number {i}",)) for i in range(first, last)]


def source_of(path, split="train", name="parquet", **options) -> Source:
    return build_source(name, split, SourceOptions(path=str(path), **options))


def as_dataset(first: int, last: int) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(rows(first, last), features)


def test_folder_of_parquet_files(tmp_path):
    write_parquet(tmp_path / "b.parquet", rows(3, 7))
    write_parquet(tmp_path / "a" / "0.parquet", rows(7, 9))
    write_parquet(tmp_path / "a.parquet", rows(0, 3))
    source = source_of(tmp_path)
    assert source.name == "parquet"
    assert contents(source) == numbers(0, 9)
    ids = [source[i].item_id for i in (0, 3, 6, 8)]
    assert ids == ["a.parquet/0", "b.parquet/0", "b.parquet/3", "a/0.parquet/1"]
    assert os.listdir(tmp_path / ".flux-index")
    assert contents(source_of(tmp_path)) == numbers(0, 9)  # from the cache, which is no data
    write_parquet(tmp_path / "b.parquet", rows(3, 5))
    os.utime(tmp_path / "b.parquet", (1, 1))
    assert len(source_of(tmp_path)) == 7


def test_one_file_and_an_index_folder(tmp_path):
    file = write_parquet(tmp_path / "data" / "a.parquet", rows(0, 3))
    source = source_of(file, index_folder=tmp_path / "index")
    assert contents(source) == numbers(0, 3)
    assert os.listdir(file.parent) == ["a.parquet"]
    assert source[1].item_id == "a.parquet/1"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_data_use_the_user_s_cache(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "data" / "a.parquet", rows(0, 3))
    file.parent.chmod(0o555)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(source_of(file)) == 3


def test_an_index_folder_that_is_none(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", rows(0, 3))
    with pytest.raises(ValueError, match=r"data\.index_folder: .* cannot be written to"):
        source_of(file, index_folder=file)


def test_image_features_saved_folders_and_arrow_files(tmp_path):
    as_dataset(0, 4).to_parquet(tmp_path / "parquet" / "0.parquet")
    assert contents(source_of(tmp_path / "parquet")) == numbers(0, 4)
    as_dataset(0, 4).save_to_disk(tmp_path / "saved")
    source = source_of(tmp_path / "saved")
    assert contents(source) == numbers(0, 4)
    assert source[2].item_id == "saved/2"
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    assert contents(source_of(arrow)) == numbers(0, 4)
    parts = datasets.DatasetDict({"train": as_dataset(0, 4), "validation": as_dataset(4, 6)})
    parts.save_to_disk(tmp_path / "dict")
    assert contents(source_of(tmp_path / "dict")) == numbers(0, 4)
    assert contents(source_of(tmp_path / "dict", "held_out")) == numbers(4, 6)


def test_parts_named_as_on_the_hub(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", rows(0, 3))
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", rows(3, 5))
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows(5, 6))
    train = source_of(tmp_path, held_out_share=0.5)
    assert contents(train) == numbers(0, 5)
    assert contents(source_of(tmp_path, "held_out", held_out_share=0.5)) == numbers(5, 6)
    write_parquet(tmp_path / "validation" / "0.parquet", rows(6, 8))
    assert contents(source_of(tmp_path, "held_out")) == numbers(6, 8)


def test_a_share_is_held_out_where_no_part_is(tmp_path):
    write_parquet(tmp_path / "train.parquet", rows(0, 20))
    train = contents(source_of(tmp_path, held_out_share=0.25))
    held_out = contents(source_of(tmp_path, "held_out", held_out_share=0.25))
    assert (len(train), len(held_out)) == (15, 5)
    assert sorted(train + held_out) == numbers(0, 20)


def test_only_a_held_out_part(tmp_path):
    write_parquet(tmp_path / "validation.parquet", rows(0, 2))
    assert len(source_of(tmp_path, "held_out")) == 2
    with pytest.raises(ValueError, match=r"training\.dataset_path: .* no train part, only valid"):
        source_of(tmp_path)


def test_columns(tmp_path):
    files = {
        "photo": [png(i) for i in range(4)],  # plain bytes
        "ratio": [0.1, 0.2, 0.3, 0.4],
        "captions": [["a", " ", "b\nc"], ["d"], [], None],
        "title": ["x"] * 4,
    }
    file = write_parquet(tmp_path / "a.parquet", files)
    source = source_of(file)
    assert source[0].captions == ("a", "b\nc")
    assert source_of(file, captions_by_line=True)[0].captions == ("a", "b", "c")
    assert np.asarray(source[1].image).max() == 1
    for row in 2, 3:
        with pytest.raises(UnreadableItem, match=f"a.parquet/{row}: has no caption"):
            source[row]
    assert source_of(file, caption_column="title")[3].captions == ("x",)
    assert source_of(file, image_column="photo")[1].item_id == "a.parquet/1"
    listed = "the columns are photo, ratio, captions, title"
    for options, message in (
        ({"image_column": "jpg"}, "data.image_column: there is no column 'jpg'; " + listed),
        ({"image_column": "title"}, "data.image_column: column 'title' holds no encoded images"),
        ({"caption_column": "text"}, "data.caption_column: there is no column 'text'; " + listed),
        ({"caption_column": "ratio"}, "data.caption_column: column 'ratio' holds no text"),
    ):
        with pytest.raises(ValueError, match=message):
            source_of(file, **options)


def test_columns_that_cannot_be_found(tmp_path):
    no_caption = write_parquet(tmp_path / "a.parquet", {"image": [png(1)], "label": [3]})
    with pytest.raises(ValueError, match=r"caption_column: no column is called text, .*label"):
        source_of(no_caption)
    no_image = write_parquet(tmp_path / "b.parquet", {"url": ["x"], "text": ["a"]})
    with pytest.raises(ValueError, match=r"image_column: no column holds images; .*url, text"):
        source_of(no_image)
    two = write_parquet(tmp_path / "c.parquet", {"a": [png(1)], "b": [png(2)], "text": ["a"]})
    with pytest.raises(ValueError, match=r"data\.image_column: one of a, b has to be named"):
        source_of(two)


def test_rows_that_cannot_be_read(tmp_path):
    (tmp_path / "beside.png").write_bytes(png(9))
    images = [
        {"bytes": None, "path": "beside.png"},
        {"bytes": None, "path": "missing.png"},
        {"bytes": None, "path": None},
        {"bytes": b"no image", "path": None},
        None,
    ]
    file = write_parquet(tmp_path / "a.parquet", {"image": images, "text": list("abcde")})
    source = source_of(file)
    assert np.asarray(source[0].image).max() == 9
    for row, reason in (
        (1, "missing.png: does not exist"),
        (2, "has no image"),
        (3, "no image in a known format"),
        (4, "has no image"),
    ):
        with pytest.raises(UnreadableItem, match=f"a.parquet/{row}: {reason}"):
            source[row]
    with pytest.raises(IndexError):
        source[5]


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"training\.dataset_path: .*nowhere does not exist"):
        source_of(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"validation\.dataset_path: not set"):
        build_source("parquet", "held_out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"training\.dataset_path: .* holds no \.parquet or"):
        source_of(tmp_path / "empty")
    said = {"a.parquet": "cannot be read as a table", "b.arrow": r"is a parquet file .* rename it"}
    for name, what in said.items():
        (tmp_path / name).write_bytes(b"PAR1 and nothing more")
        with pytest.raises(ValueError, match=rf"dataset_path: .*{name} {what}"):
            source_of(tmp_path / name)
    as_dataset(0, 2).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match=r"saved cannot be opened: .*\.arrow: No such file"):
        source_of(tmp_path / "saved")
    write_parquet(tmp_path / "none" / "0.parquet", rows(0, 1)).touch()
    pq.write_table(pa.table(rows(0, 1)).slice(0, 0), tmp_path / "none" / "0.parquet")
    with pytest.raises(ValueError, match="holds no row"):
        source_of(tmp_path / "none")


def test_groups_without_rows(tmp_path):
    table = pa.table(rows(0, 3))
    with pq.ParquetWriter(tmp_path / "0.parquet", table.schema) as writer:
        for part in table.slice(0, 0), table.slice(0, 2), table.slice(0, 0), table.slice(2, 1):
            writer.write_table(part)
    assert contents(source_of(tmp_path)) == numbers(0, 3)


def test_no_bars_of_datasets_are_shown(tmp_path, capfd):
    datasets.enable_progress_bars()
    source_of(write_parquet(tmp_path / "0.parquet", rows(0, 3)))
    assert "examples/s" not in "".join(capfd.readouterr())
    assert not datasets.are_progress_bars_disabled()


def _count(arguments) -> int:
    path, index_folder = arguments
    return len(source_of(path, index_folder=index_folder))


def test_several_processes_at_once(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", rows(0, 200))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_count, [(file, tmp_path / "index")] * 4) == [200] * 4


def test_can_be_sent_to_a_worker(tmp_path):
    source = source_of(write_parquet(tmp_path / "a.parquet", rows(0, 2000)))
    sent = pickle.dumps(source)
    assert len(sent) < 20_000  # the rows are not in it
    assert contents(pickle.loads(sent)) == contents(source)


def test_the_hub_cannot_be_reached(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = (
        r"training\.dataset_path: someone/pictures is neither here nor available from the hub "
        r"\(Couldn't reach the Hub\); download it with `hf download someone/pictures "
        r"--repo-type dataset --local-dir pictures`"
    )
    with pytest.raises(ValueError, match=message):
        source_of("someone/pictures")


def test_the_hub(monkeypatch):
    parts = datasets.DatasetDict({"train": as_dataset(0, 4), "test": as_dataset(4, 6)})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: parts)
    assert contents(source_of("someone/pictures")) == numbers(0, 4)
    held_out = source_of("someone/pictures", "held_out")
    assert contents(held_out) == numbers(4, 6)
    assert held_out[1].item_id == "test/1"


@pytest.mark.parametrize(("split", "key"), [("train", "training"), ("held_out", "validation")])
def test_coco(tmp_path, split, key):
    with pytest.raises(ValueError, match=rf"{key}\.dataset_path: .*download howard-hou/COCO-Text"):
        build_source("coco-validation", split)
    columns = rows(0, 3, caption=[[f"first {i}", f"second {i}"] for i in range(3)])
    del columns["text"]
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", columns)
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", columns)
    source = source_of(tmp_path, split, "coco-validation")
    assert source[1].captions == ("first 1", "second 1")
    part = "train" if split == "train" else "validation"
    assert source[1].item_id == f"data/{part}-00000-of-00001.parquet/1"
