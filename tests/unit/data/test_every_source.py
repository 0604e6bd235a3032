"""What holds for folders, tar shards and tables alike: items, index, splits, workers."""

import io
import logging
import multiprocessing
import os
import pickle
import re
import shutil

import datasets
import numpy as np
import pytest
from data_files import (
    captions,
    indexed,
    notes,
    png,
    refuses,
    rows,
    unreadable,
    write_samples,
)
from PIL import Image

from torchtitan_flux.data.sources import indexed as indexing
from torchtitan_flux.data.sources.captions import NO_CAPTION
from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import Source, SourceOptions, UnreadableItem
from torchtitan_flux.data.sources.split import SourcePart
from torchtitan_flux.data.transforms import to_training_image
from torchtitan_flux.latents import ImageSize

KINDS = ("folder", "webdataset", "parquet")


@pytest.fixture(params=KINDS)
def kind(request, tmp_path, monkeypatch) -> str:
    datasets.disable_progress_bars()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return request.param


def samples(*numbers: int) -> list[tuple[str, bytes, str]]:
    return [(f"{n:03d}.png", png(n), f"no. {n}") for n in numbers]


def shades(source: Source) -> list[int | str]:
    """Of each picture, whose caption has to be its own; or why it cannot be read."""
    found = []
    for index in range(len(source)):
        try:
            item = source[index]
            found.append(int(np.asarray(item.image).max()))
            assert item.captions == (f"no. {found[-1]}",)
        except UnreadableItem as error:
            found.append(error.reason)
    return found


def test_the_same_items_with_their_sizes(tmp_path, kind):
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (30, 20), 99).save(turned, "JPEG", exif=exif)
    files = [(f"{n}.png", png(9 * n, (24 + n, 20)), f"no. {n}\nalso {n}") for n in range(9)]
    files += [("turned.JPG", turned.getvalue(), "turned")]
    for part in range(2):
        write_samples(kind, tmp_path / "data" / str(part), files[part::2])
    source = indexed(kind, tmp_path / "data", captions_by_line=True)
    wanted = {tuple(text.split("\n")): data for _, data, text in files}
    sizes = {text: (24 + n, 20) for n, text in enumerate(wanted)} | {("turned",): (20, 30)}
    found = {row.captions: row[3:6] for row in rows(source)}
    assert found == {text: (len(data), *sizes[text]) for text, data in wanted.items()}
    for item in (source[i] for i in range(len(source))):
        pictures = item.image, Image.open(io.BytesIO(wanted[item.captions]))
        trained_on = [to_training_image(image, ImageSize(24, 24), 3) for image in pictures]
        np.testing.assert_array_equal(*trained_on)


def test_crosses_to_workers(tmp_path, kind):
    write_samples(kind, tmp_path / "data" / "0", samples(*range(40)))
    source = indexed(kind, tmp_path / "data")
    sent = pickle.dumps(source)
    assert len(sent) < 20_000  # no rows are in it
    assert shades(pickle.loads(sent)) == list(range(40))
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:  # both read at once
            found = pool.map(source.__getitem__, range(40), chunksize=1)
        assert [item.captions for item in found] == [(f"no. {n}",) for n in range(40)]


def test_an_index_is_used_until_the_data_change(tmp_path, kind, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    data = tmp_path / "data"

    def reopened(**options) -> tuple[str, str, str]:
        """(identity, digest of the ids, why it was built anew), which lies in the data."""
        caplog.clear()
        index = indexed(kind, data, index_folder=data / "index", **options).index
        why = re.search(r"built anew: (.*)", caplog.text)
        return index.identity, index.digest, why[1] if why else ""

    written = write_samples(kind, data / "a", samples(0, 1, 2))
    identity, digest, _ = reopened()
    assert reopened() == (identity, digest, "")
    assert reopened(captions_by_line=True)[0] != identity
    assert reopened() == (identity, digest, "")  # the one does not replace the other

    def touch() -> None:
        os.utime(written / "000.png" if kind == "folder" else written, ns=(1, 1))

    other = data / {"folder": "b", "webdataset": "b.tar", "parquet": "b.parquet"}[kind]
    for change, why, same in (
        (touch, "has changed", True),
        (lambda: write_samples(kind, data / "b", samples(3)), "has changed", False),
        (lambda: shutil.rmtree(other) if other.is_dir() else other.unlink(), "has changed", True),
        (lambda: monkeypatch.setattr(indexing, "formats", lambda: ("HEIF",)), "formats", True),
    ):
        change()
        new, ids, reason = reopened()
        assert new != identity
        assert (ids == digest) == same
        assert why in reason
        assert reopened() == (new, ids, "")
        identity = new


def test_a_named_index_folder_is_all_that_is_written_to(tmp_path, kind):
    write_samples(kind, tmp_path / "data" / "a", samples(0, 1))
    before = sorted(tmp_path.rglob("*"))
    assert shades(indexed(kind, tmp_path / "data", index_folder=tmp_path / "index")) == [0, 1]
    written = set(tmp_path.rglob("*")) - set(before)
    assert all(path.is_relative_to(tmp_path / "index") for path in written)
    (tmp_path / "file").touch()
    message = r"data\.index_folder: .* cannot be written to"
    refuses(kind, tmp_path / "data", message, index_folder=tmp_path / "file")


def test_parts_that_are_named_for_a_split(tmp_path, kind):
    data = tmp_path / "data"
    names = ("train", "val", "test", "extra")
    paths = [write_samples(kind, data / name, samples(n)) for n, name in enumerate(names)]
    train = indexed(kind, data, held_out_share=0.5)  # which is not used
    assert shades(train) == [0]
    assert sorted(notes(train).values()) == [(paths[3].name,), (paths[2].name,)]
    for number in (1, 2):
        held_out = indexed(kind, data, "held_out", validates_training_data=True)
        assert shades(held_out) == [number]
        shutil.rmtree(paths[number]) if kind == "folder" else paths[number].unlink()
    whole = [0] if kind == "parquet" else [3, 0]  # a lone train part of files is one all the same
    assert shades(indexed(kind, data)) == whole


def test_a_share_of_what_can_be_read_is_held_out(tmp_path, kind):
    files = samples(*range(20))
    files[1], files[2] = ("001.png", b"", "no. 1"), ("002.png", png(2), " ")
    write_samples(kind, tmp_path / "data" / "a", files)
    options = SourceOptions(path=str(tmp_path / "data"), held_out_share=0.6)
    train, held_out = (build_source(kind, split, options) for split in ("train", "held_out"))
    assert isinstance(held_out, SourcePart)
    assert (len(train), len(held_out)) == (8, 12)
    bad = ["the file is empty", NO_CAPTION]
    assert not set(bad) & set(shades(held_out))
    found = shades(train) + shades(held_out)
    assert sorted(found, key=str) == sorted([0, *range(3, 20), *bad], key=str)
    message = "has no validation or test part"
    refuses(kind, tmp_path / "data", message, "held_out", validates_training_data=True)


UNREADABLE = {
    b"": "the file is empty",
    b"noise" * 100: "no image in a known format",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "no image in a known format",  # a program
    b"<!DOCTYPE html><title>404</title>": "is a web page",
    b"version https://git-lfs.github.com/spec/v1\noid": "is a Git LFS pointer, run `git lfs",
}


def test_what_cannot_be_read_is_an_item_with_a_reason(tmp_path, kind):
    files = [(f"{n}.png", data, f"no. {n}") for n, data in enumerate(UNREADABLE)]
    files.append(("9.png", png(), " "))
    write_samples(kind, tmp_path / "data" / "a", files)
    source = indexed(kind, tmp_path / "data")
    for index, reason in enumerate((*UNREADABLE.values(), NO_CAPTION)):
        assert source.index[index].reason.startswith(reason)
        assert unreadable(source, index).startswith(reason)
    assert not source.usable_rows.any()
    with pytest.raises(IndexError):
        source[len(files)]
    defaults = indexed(kind, tmp_path / "data", default_caption="", caption_prefix="a: ")
    assert defaults[5].captions == ("a: ",)


def test_a_caption_is_one_unless_lines_are_said_to_be(tmp_path, kind):
    strange = "one\u2028line\x85that\x0bnever\x0cends"
    texts = (strange, "first\rsecond\r\n \r\nthird\n\n", "\n")
    files = [(f"{n}.png", png(), text) for n, text in enumerate(texts)]
    write_samples(kind, tmp_path / "data" / "a", files)
    found = captions(indexed(kind, tmp_path / "data"))
    assert list(found.values()) == [(strange,), ("first\rsecond\r\n \r\nthird",), NO_CAPTION]
    found = captions(indexed(kind, tmp_path / "data", captions_by_line=True))
    assert list(found.values()) == [(strange,), ("first", "second", "third"), NO_CAPTION]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_what_is_not_there_is_refused(tmp_path, kind, split):
    (tmp_path / "empty").mkdir()
    for path, message in (
        (None, "not set; name the data"),
        (tmp_path / "nowhere", "nowhere does not exist"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "empty", "holds no"),
    ):
        refuses(kind, path, message, split)
