"""Tar shards read at random, and the data set of torchtitan's name `cc12m-test`."""

import io
import json
import logging
import multiprocessing
import os
import pickle
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_files import indexed, write_tar
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from torchtitan_flux.data.order import Order
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import SourceOptions, UnreadableItem

ROOT = Path(__file__).parents[3]
ASSETS = ROOT / "tests" / "assets"


def picture(shade: int = 0, format: str = "PNG", size: tuple[int, int] = (11, 7)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), shade, np.uint8)).save(file, format)
    return file.getvalue()


def numbered(path: Path, count: int, start: int = 0) -> None:
    """A shard of samples with a .png and a .txt each."""
    members: dict[str, bytes | str] = {}
    for number in range(start, start + count):
        members |= {f"{number:04d}.png": picture(number), f"{number:04d}.txt": f"no. {number}"}
    write_tar(path, members.items())


def source(path: Path | str, **options) -> IndexedSource:
    return indexed("webdataset", path, **options)


def ids(items: IndexedSource) -> list[str]:
    return [items.index[i].item_id for i in range(len(items))]


def notes(items: IndexedSource) -> list[tuple]:
    return [tuple(note) for note in items.index.notes]


def refusal(items: IndexedSource, index: int) -> str:
    with pytest.raises(UnreadableItem) as caught:
        items[index]
    return str(caught.value)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_random_access_equals_sequential_reading(tmp_path, format):
    rng = random.Random(0)
    for shard in range(3):
        members: dict[str, bytes | str] = {}
        for number in range(7):
            # Long and non-ASCII names take extra headers.
            key = f"fold.er/{'long' * 40 * (number % 2)}ü{shard}{number}"
            suffix, kind = rng.choice([("jpg", "JPEG"), ("PNG", "PNG"), ("webp", "WEBP")])
            members[f"{key}.{suffix}"] = picture(20 * number, kind, (9 + shard, 5 + number))
            members[f"{key}.txt"] = f"caption {shard} {number}\nmore"
            members[f"{key}.npy.gz"] = b"of no use"
        write_tar(tmp_path / f"{shard:02d}.tar", members.items(), format)
    expected = []
    for shard in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(shard) as tar:
            contents = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in contents.items():
            if name.endswith((".txt", ".gz")):
                continue
            key = name.rpartition(".")[0]
            captions = (contents[f"{key}.txt"].decode(),)
            expected.append((f"{shard.name}/{key}", Image.open(io.BytesIO(data)), captions))

    items = source(tmp_path)
    assert len(items) == len(expected) == 21
    order = Order(1, len(items))
    for position in range(len(items)):
        index = order.item(position)
        item_id, image, captions = expected[index]
        item, row = items[index], items.index[index]
        assert (item.item_id, item.captions) == (item_id, captions)
        assert item.image.tobytes() == image.tobytes()
        assert (row.width, row.height) == image.size


def test_captions_come_from_text_or_json(tmp_path):
    png = picture()
    samples = {
        "both": {"txt": "from txt", "json": '{"caption": "from json", "alt": "other"}'},
        "json": {"json": '{"prompt": "p", "captions": ["a", "b"], "text": ""}'},
        "blank": {"txt": " ", "json": '{"caption": "from json", "alt": "other"}'},
        "txt": {"txt": "\ufefftwo\nlines"},
    }
    members: dict[str, bytes | str] = {}
    for key, files in samples.items():
        members |= {f"{key}.{suffix}": text for suffix, text in files.items()}
        members[f"{key}.png"] = png
    write_tar(tmp_path / "x.tar", members.items())
    items = source(tmp_path)
    assert [items[i].captions for i in range(4)] == [
        ("from txt",),
        ("a", "b"),
        ("from json",),
        ("two\nlines",),
    ]
    items = source(tmp_path, caption_column="alt")
    assert items[0].captions == ("other",)
    assert refusal(items, 1) == "x.tar/json: its .json has no 'alt'"
    assert [items[i].captions for i in (2, 3)] == [("other",), ("two\nlines",)]
    assert source(tmp_path, captions_by_line=True)[3].captions == ("two", "lines")


def test_members_of_a_sample_need_not_be_neighbours(tmp_path):
    members = {"b.jpg": picture(1, "JPEG"), "./a.jpg": picture(2, "JPEG"), "a.txt": "A"}
    members |= {"a.txt": "A", "b.txt": "B", ".hidden.txt": "", "README": ""}
    write_tar(tmp_path / "x.tar", members.items())
    items = source(tmp_path)
    assert [(items[i].item_id, items[i].captions) for i in range(2)] == [
        ("x.tar/b", ("B",)),
        ("x.tar/a", ("A",)),
    ]


def test_what_cannot_be_read_is_an_item_with_a_reason(tmp_path):
    members: dict[str, bytes | str] = {
        "0.png": picture(),
        "1.png": picture(),
        "1.json": '{"caption": ',
        "2.png": picture(),
        "2.json": "[" * 100_000,
        "3.png": picture(),
        "3.json": '["a list"]',
        "4.png": picture(),
        "4.json": '{"caption": {"a": 3}}',
        "5.png": picture(),
        "5.txt": b"\xff",
        "6.png": b"",
        "6.txt": "x",
        "7.png": b"noise",
        "7.txt": "x",
        "8.png": picture(),
        "8.json": '{"caption": "half \\ud800 a pair"}',
        "only text.txt": "x",
        "only json.json": "{}",
    }
    write_tar(tmp_path / "x.tar", members.items())
    items = source(tmp_path)
    assert notes(items) == [
        ("samples without a picture", 2, 0, ("x.tar/only text", "x.tar/only json"))
    ]
    assert [refusal(items, i) for i in range(7)] == [
        "x.tar/0: has no caption",
        "x.tar/1: its .json is no JSON",
        "x.tar/2: its .json is no JSON",
        "x.tar/3: its .json holds no object",
        "x.tar/4: has no caption",
        "x.tar/5: its .txt is not UTF-8",
        "x.tar/6: the file is empty",
    ]
    assert refusal(items, 7).startswith("x.tar/7: no image")
    assert items[8].captions == ("half ? a pair",)
    assert [items.index[i][4:6] for i in (6, 7)] == [(0, 0), (0, 0)]
    with pytest.raises(IndexError):
        items[9]


def test_a_cut_shard_is_used_up_to_the_cut(tmp_path):
    numbered(tmp_path / "whole.tar", 6)
    data = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        members = tar.getmembers()
    cuts = {
        "in an image": (members[4].offset_data + 20, 2, 1, "unexpected end of data", 1),
        "before a header": (members[4].offset, 2, 0, "ends without the mark", 0),
        "in a header": (members[4].offset + 100, 2, 0, "ends without the mark", 1),
        "before the end mark": (members[-1].offset + 1024, 6, 0, "ends without the mark", 0),
    }
    for name, (length, readable, unreadable, damage, lost) in cuts.items():
        (tmp_path / "cut").mkdir(exist_ok=True)
        (tmp_path / "cut" / "x.tar").write_bytes(data[:length])
        items = source(tmp_path / "cut")
        assert notes(items)[0][:3] == ("damaged shards", 1, lost), name
        assert damage in notes(items)[0][3][0], name
        assert len(items) == readable + unreadable, name
        assert [items[i].captions for i in range(readable)] == [
            (f"no. {i}",) for i in range(readable)
        ]
        if unreadable:
            assert refusal(items, readable) == "x.tar/0002: lies beyond the end of its shard"
        if name == "in an image":  # the shard shrinks further while it is in use
            (tmp_path / "cut" / "x.tar").write_bytes(data[: members[2].offset_data + 20])
            assert refusal(items, 1) == "x.tar/0001: lies beyond the end of its shard"
            (tmp_path / "cut" / "x.tar").unlink()
            fresh = pickle.loads(pickle.dumps(items))
            assert refusal(fresh, 0) == "x.tar/0000: does not exist"


@pytest.mark.parametrize("garbage", [b"", b"no tar at all" * 100, bytes(512 * 7)])
def test_a_shard_that_is_none_is_named_and_the_others_are_used(tmp_path, garbage):
    numbered(tmp_path / "b.tar", 2)
    (tmp_path / "a.tar").write_bytes(garbage)
    items = source(tmp_path)
    assert ids(items) == ["b.tar/0000", "b.tar/0001"]
    assert len(notes(items)) == (garbage != bytes(512 * 7))


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path):
    numbered(tmp_path / "x.tar", 4)
    data = bytearray((tmp_path / "x.tar").read_bytes())
    with tarfile.open(tmp_path / "x.tar") as tar:
        at = tar.getmembers()[4].offset
    data[at : at + 512] = b"?" * 512
    (tmp_path / "x.tar").write_bytes(data)
    items = source(tmp_path)
    assert len(items) == 2
    # Four members of two blocks each are the two samples that can be read; two are lost, and the
    # zeros that fill the file up count for one more.
    assert notes(items) == [("damaged shards", 1, 3, (f"x.tar: no tar header at byte {at}",))]


def test_a_negative_size_is_damage_and_no_endless_loop(tmp_path):
    numbered(tmp_path / "x.tar", 4)
    data = bytearray((tmp_path / "x.tar").read_bytes())
    with tarfile.open(tmp_path / "x.tar") as tar:
        at = tar.getmembers()[4].offset
    header = data[at : at + 512]
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)  # GNU's binary notation
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[at : at + 512] = header
    (tmp_path / "x.tar").write_bytes(data)
    items = source(tmp_path)
    assert len(items) == 2
    assert f"negative size at byte {at}" in notes(items)[0][3][0]


def test_which_shards_a_path_means(tmp_path):
    for number, name in enumerate(["00.tar", "01.tar", "02.tar", "deep/03.TAR", ".hid/04.tar"]):
        numbered(tmp_path / name, 1, number)

    def shards(path: str) -> list[str]:
        return [name.rpartition("/")[0] for name in ids(source(f"{tmp_path}{path}"))]

    assert shards("") == ["00.tar", "01.tar", "02.tar", "deep/03.TAR"]
    assert shards("/01.tar") == ["01.tar"]
    assert shards("/{02..00}.tar") == ["02.tar", "01.tar", "00.tar"]
    assert shards("/0[12].tar") == ["01.tar", "02.tar"]
    assert shards("/{deep/03.TAR,00.tar}") == ["deep/03.TAR", "00.tar"]
    assert shards("/*/*.TAR") == ["03.TAR"]


@pytest.mark.parametrize(
    ("split", "key"), [("train", "training.dataset_path"), ("held_out", "validation.dataset_path")]
)
def test_errors_name_the_key(tmp_path, split, key):
    def fails(name: str, path: str | None, message: str) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(key)}: .*{message}"):
            build_source(name, split, SourceOptions(path=path))

    fails("webdataset", None, "not set; name the data")
    fails("webdataset", f"{tmp_path}/no.tar", "no.tar does not exist$")
    fails("webdataset", "https://x.org/{0..9}.tar", "0.tar and 9 more does not exist; .*download")
    fails("webdataset", f"{tmp_path}/*.tar", "no file matches")
    fails("webdataset", str(tmp_path), "holds no .tar files$")
    (tmp_path / "x.tar.gz").write_text("")
    fails("webdataset", str(tmp_path), "x.tar.gz: compressed tar files .*unpack")
    (tmp_path / "x.tar.gz").unlink()
    write_tar(tmp_path / "x.tar", [("a.txt", "x")])
    fails(
        "webdataset",
        str(tmp_path),
        "the 1 tar files of .* hold no pictures; samples without a picture: x.tar/a",
    )
    fails("cc12m-wds", None, "hf download pixparse/cc12m-wds .* --local-dir")


def test_changes_are_noticed(tmp_path, caplog, monkeypatch):
    def why(path: Path | str = tmp_path) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            source(path)
        found = re.search(r"built anew: (.*)", caplog.text)
        assert bool(found) == ("Indexed" in caplog.text)
        return found[1] if found else ""

    for number in range(2):
        numbered(tmp_path / f"{number}.tar", 2, number)
    source(tmp_path)
    assert why() == ""
    numbered(tmp_path / "2.tar", 1)
    assert why() == "2.tar is new"
    assert why() == ""
    (tmp_path / "0.tar").unlink()
    assert why() == "0.tar is gone"
    os.utime(tmp_path / "1.tar", ns=(1, 1))
    assert why() == "1.tar has changed"
    numbered(tmp_path / "1.tar", 5)
    assert why() == "1.tar has changed"
    assert len(source(tmp_path)) == 6
    assert why() == ""
    (tmp_path / "unrelated").write_text("")
    assert why() == ""
    monkeypatch.setattr("torchtitan_flux.data.sources.index_cache.formats", lambda: ("HEIF",))
    assert why() == "what formats can be read has changed"
    monkeypatch.undo()


def test_crosses_to_workers(tmp_path):
    for shard in range(7):
        numbered(tmp_path / f"{shard}.tar", 3, 10 * shard)
    items = source(tmp_path)
    order = Order(0, len(items))
    expected = [items[order.item(i)].captions for i in range(len(items))]
    assert len(pickle.dumps(items)) < 3000
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            found = pool.map(items.__getitem__, map(order.item, range(len(items))), chunksize=1)
        assert [item.captions for item in found] == expected


def test_the_torchtitan_name_reads_the_committed_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = SourceOptions(index_folder=tmp_path)
    items = build_source("cc12m-test", "train", options)
    assert len(items) == 32
    assert items[31].item_id == "cc12m-train-0000.tar/000000031"
    assert len({items[i].image.size for i in range(32)}) == 4
    assert all(len(items[i].captions) == 1 for i in range(32))
    options = SourceOptions(index_folder=tmp_path, caption_column="captions", held_out_share=0.1)
    parts = [build_source("cc12m-test", split, options) for split in ("train", "held_out")]
    assert [len(part) for part in parts] == [29, 3]
    assert len(parts[1][0].captions) == 5

    numbered(tmp_path / "mine" / "tests/assets/cc12m_test" / "x.tar", 2)
    monkeypatch.chdir(tmp_path / "mine")
    assert len(build_source("cc12m-test", "train")) == 2
    path = str(ASSETS / "cc12m_test")
    options = SourceOptions(path=path, index_folder=tmp_path)
    assert len(build_source("cc12m-wds", "train", options)) == 32


def test_the_assets_are_written_again_byte_for_byte(tmp_path):
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_test_assets.py", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    written = {file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()}
    assert {str(file) for file in written} == {
        "cc12m_test/cc12m-train-0000.tar",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    }
    for file in written:
        assert (tmp_path / file).read_bytes() == (ASSETS / file).read_bytes(), file
    assert sum((ASSETS / file).stat().st_size for file in written) < 300_000


def test_the_tokenizer_loads_both_ways():
    folder = ASSETS / "tokenizer"
    caption = json.loads('"a red circle at the top left"')
    tokens = AutoTokenizer.from_pretrained(folder)(caption).input_ids
    assert tokens == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(caption).ids
    assert len(tokens) == len(caption.split()) + 1
