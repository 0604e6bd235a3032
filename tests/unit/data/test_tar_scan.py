"""Which members of a shard are a sample, and what is said of those that are none."""

import errno
import io
import os
import tarfile
import unicodedata
from pathlib import Path

import pytest
from data_files import indexed, png, write_tar

from torchtitan_flux.data.sources.captions import NO_CAPTION
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import Source, SourceOptions, Split
from torchtitan_flux.data.sources.webdataset import CUT, UNCLEAR


def source(path: Path, **options) -> IndexedSource:
    return indexed("webdataset", path, **options)


def rows(items: IndexedSource) -> list[tuple]:
    """Id, captions and reason of each."""
    found = (items.index[i] for i in range(len(items)))
    return [(row.item_id, row.captions, row.reason) for row in found]


def lost(items: IndexedSource) -> int:
    return sum(note.lost for note in items.index.notes)


def notes(items: IndexedSource) -> dict[str, tuple]:
    """What the notes say after their first word: count, lost, examples."""
    return {note.text.partition(" that ")[0]: tuple(note)[1:] for note in items.index.notes}


def of(tmp_path: Path, *members: tuple[str, bytes | str], **options) -> IndexedSource:
    return source(write_tar(tmp_path / "x.tar", members), **options)


def test_a_key_ends_at_the_first_dot_and_what_follows_is_counted(tmp_path):
    items = of(
        tmp_path,
        ("plain.png", png()),
        ("plain.txt", "p"),
        ("2024.05.17.png", png()),
        ("2024.05.17.txt", "q"),
        ("Mr. Fox.PNG", png()),
        ("Mr. Fox.txt", "fox"),
        ("fold.er/deep.png", png()),
        ("fold.er/deep.txt", "d"),
    )
    assert rows(items) == [("x.tar/plain", ("p",), ""), ("x.tar/fold.er/deep", ("d",), "")]
    names = ("2024.05.17.png", "2024.05.17.txt", "Mr. Fox.PNG", "Mr. Fox.txt")
    text = "members with a further dot in their names, where the key ends at the first"
    assert notes(items) == {text: (4, 2, tuple(f"x.tar/{name}" for name in names))}
    assert lost(items) == 2


def test_further_pictures_of_a_sample_are_no_samples(tmp_path):
    items = of(
        tmp_path,
        ("000.seg.png", png(7)),
        ("000.jpg", png(1)),
        ("000.txt", "a"),
        ("000.depth.png", png(8)),
        ("001.seg.png", png(9)),
        ("001.txt", "b"),
    )
    assert rows(items) == [("x.tar/000", ("a",), "")]
    assert items[0].image.getpixel((0, 0)) == 1
    further = "further pictures of a sample (names of several suffixes)"
    assert notes(items)[further] == (2, 0, ("x.tar/000.seg.png", "x.tar/000.depth.png"))
    assert lost(items) == 1  # 001


def test_a_repeated_key_is_never_paired_wrongly(tmp_path):
    once = (("0.png", png(1)), ("1.png", png(2)), ("0.txt", "a"), ("1.txt", "b"))
    assert rows(of(tmp_path / "sorted by suffix", *once)) == [
        ("x.tar/0", ("a",), ""),
        ("x.tar/1", ("b",), ""),
    ]
    first = (("0.png", png(1)), ("0.txt", "a"))
    again = (("0.txt", "c"), ("0.png", png(3)))
    between = (("1.png", png(2)), ("1.txt", "b"), ("0#2.png", png(4)), ("0#2.txt", "d"))
    items = of(tmp_path / "each whole", *first, *between, *again)
    assert rows(items) == [
        ("x.tar/0", ("a",), ""),
        ("x.tar/1", ("b",), ""),
        ("x.tar/0#2", ("d",), ""),
        ("x.tar/0#3", ("c",), ""),
    ]
    assert [items[i].image.getpixel((0, 0)) for i in range(4)] == [1, 2, 4, 3]
    assert notes(items) == {"keys": (1, 0, ("x.tar/0#3",))}
    items = of(tmp_path / "one without a text", *first, *between[:2], ("0.png", png(3)))
    assert rows(items)[::2] == [("x.tar/0", ("a",), ""), ("x.tar/0#2", (), NO_CAPTION)]
    unclear = {
        "neighbours": (*first, *again),
        "texts apart": (("0.png", png(1)), ("1.png", png(2)), ("1.txt", "b"), *again),
        "two texts": (*first, *between[:2], ("0.txt", "c")),
        "two pictures": (("0.jpg", png(1)), ("0.png", png(2)), ("0.txt", "a")),
        "pictures, then texts": (*first[:1], *again[1:], *first[1:], *again[:1]),
    }
    for name, members in unclear.items():
        items = of(tmp_path / name, *members)
        count = sum(member in ("0.png", "0.jpg") for member, _ in members)
        wanted = [("x.tar/0", (), UNCLEAR), ("x.tar/0#2", (), UNCLEAR)][:count]
        assert [row for row in rows(items) if "/0" in row[0]] == wanted, name
        assert sum(note.count for note in items.index.notes) == count, name
        assert all(row[1] for row in rows(items) if "/1" in row[0]), name


def test_the_suffix_of_pictures_can_be_named(tmp_path):
    members = (("0.jpg", png(1)), ("0.png", png(2)), ("0.seg.PNG", png(3)), ("0.txt", "a"))
    assert rows(of(tmp_path, *members)) == [("x.tar/0", (), UNCLEAR), ("x.tar/0#2", (), UNCLEAR)]
    for number, suffix in enumerate(("jpg", ".PNG", "seg.png"), 1):
        items = source(tmp_path, image_column=suffix)
        assert rows(items) == [("x.tar/0", ("a",), "")]
        assert items[0].image.getpixel((0, 0)) == number
    with pytest.raises(ValueError, match=r"hold no pictures; samples without a picture: \.png is"):
        source(tmp_path, image_column="webp")


def test_texts_in_any_kind_case_and_spelling(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    items = of(
        tmp_path,
        ("0.PNG", png()),
        ("0.TXT", "upper"),
        ("1.png", png()),
        ("1.caption", "a caption"),
        ("2.png", png()),
        ("2.json", '{"width": 3}'),
        ("2.txt", "the text counts"),
        ("3.png", png()),
        ("3.txt", " "),
        ("3.JSON", '{"caption": "the record counts"}'),
        ("4.png", png()),
        ("4.caption", "not this"),
        ("4.json", '{"caption": "this"}'),
        ("5.png", png()),
        ("5.txt", ""),
        ("5.json", "{"),
        (f"{nfd}.png", png()),
        (f"{nfc}.txt", "coffee"),
        ("6.png", png()),
        ("6.txt", "not é"),
    )
    captions = {item_id: (texts, reason) for item_id, texts, reason in rows(items)}
    assert captions == {
        "x.tar/0": (("upper",), ""),
        "x.tar/1": (("a caption",), ""),
        "x.tar/2": (("the text counts",), ""),
        "x.tar/3": (("the record counts",), ""),
        "x.tar/4": (("this",), ""),
        "x.tar/5": ((), "its .json is no JSON"),
        f"x.tar/{nfd}": (("coffee",), ""),
        "x.tar/6": (("not é",), ""),
    }
    assert not items.index.notes


def test_two_spellings_of_one_name_are_two_samples(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    members = ((f"{nfc}.png", png(1)), (f"{nfd}.png", png(2)), (f"{nfc}.txt", "c"))
    items = of(tmp_path / "one text", *members)
    assert rows(items) == [(f"x.tar/{nfc}", ("c",), ""), (f"x.tar/{nfd}", (), NO_CAPTION)]
    items = of(tmp_path / "two texts", *members, (f"{nfd}.txt", "d"))
    assert rows(items) == [(f"x.tar/{nfc}", ("c",), ""), (f"x.tar/{nfd}", ("d",), "")]


def test_what_is_no_plain_file_or_of_an_unread_suffix_is_noted(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("0.png", png()), ("0.txt", "a"), ("1.xyz", "")])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        tar.addfile(link)
        text = tarfile.TarInfo("1.txt")
        tar.addfile(text)
        tar.addfile(tarfile.TarInfo("\udcff.png"))
    items = source(path)
    assert rows(items) == [("x.tar/0", ("a",), "")]
    found = {note.text: (note.lost, note.examples) for note in items.index.notes}
    assert found == {
        "members that are links or sparse files": (1, ("x.tar/2.png",)),
        "members whose names are not UTF-8": (1, ("x.tar/'\\udcff.png'",)),
        "samples without a picture: .xyz is not read": (0, ("x.tar/1",)),
    }


def test_lost_samples_of_damaged_shards_are_estimated(tmp_path):
    members = [
        (f"{i}.{s}", png(i) if s == "png" else "x") for i in range(40) for s in ("png", "txt")
    ]
    data = write_tar(tmp_path / "whole.tar", members).read_bytes()
    half = 20 * 4 * 512
    damaged = {
        "header": (data[:half] + b"?" * 512 + data[half + 512 :], 20),
        "cut": (data[: half + 520], 19),
        "joined": (data + data, 40),
        "no mark": (data[: 2 * half], 0),
        "empty": (b"", 40),
        "noise": (b"?" * len(data), 40),
    }
    for name, (content, missing) in damaged.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.tar").write_bytes(content)
        (folder / "b.tar").write_bytes(data)
        items = source(folder)
        (note,) = items.index.notes
        assert note.examples[0].startswith("a.tar: "), name
        # tar fills up with as many zeros as five samples have bytes here.
        assert abs(lost(items) - missing) <= 10, name
        if name == "cut":
            assert rows(items)[20][2] == CUT


class Failing(io.BufferedReader):
    """A file that the system does not read beyond a byte."""

    limit = 0

    def read(self, size=-1):
        if self.tell() + max(size, 0) > self.limit:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self.name))
        return super().read(size)


def test_what_the_system_refuses_is_tried_again(tmp_path, monkeypatch):
    for shard in range(3):
        members = [
            (f"{i}.{s}", png() if s == "png" else "x") for i in range(4) for s in ("png", "txt")
        ]
        write_tar(tmp_path / f"{shard}.tar", members)
    whole = [row[0] for row in rows(source(tmp_path))]
    (tmp_path / "1.tar").rename(tmp_path / "elsewhere")
    (tmp_path / "1.tar").symlink_to(tmp_path / "nowhere")
    items = source(tmp_path)
    assert [row[0] for row in rows(items)] == whole[:4] + whole[8:]
    (note,) = items.index.notes
    assert (note.count, note.lost) == (1, 4)
    assert "cannot be opened" in note.text
    identity = items.index.identity
    assert source(tmp_path).index.identity == identity
    (tmp_path / "1.tar").unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "1.tar")
    assert [row[0] for row in rows(source(tmp_path))] == whole

    opened = Path.open
    monkeypatch.setattr(Failing, "limit", 2 * 4 * 512 + 100)
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, *a, **k: (
            Failing(io.FileIO(path)) if path.name == "1.tar" else opened(path, *a, **k)
        ),
    )
    monkeypatch.setattr("torchtitan_flux.data.sources.index_cache.can_open", lambda path, at: False)
    os.utime(tmp_path / "1.tar", ns=(1, 1))
    items = source(tmp_path)
    assert [row[0] for row in rows(items)] == whole[:6] + whole[8:]
    assert lost(items) == 3  # two, and zeros for one
    assert not any("Input" in row[2] for row in rows(items))
    assert any(at for _, at in items.index.refused)
    assert source(tmp_path).index.identity == items.index.identity
    monkeypatch.undo()
    assert [row[0] for row in rows(source(tmp_path))] == whole


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.tar.gz",
            b"",
            r"x\.tar\.gz: compressed .* unpack",
        ),
        ("x.tgz", b"", r"x\.tgz: compressed .* unpack"),
        ("X.TAR.ZST", b"", r"X\.TAR\.ZST: compressed .* unpack"),
        ("x.tar", b"\x1f\x8b\x08", r"x\.tar is gzip under another name: unpack"),
        ("x.tar", b"\x28\xb5\x2f\xfd", r"x\.tar is zstd under another name"),
        ("x.tar", b"\xfd7zXZ\0", r"x\.tar is xz under another name"),
        ("x.tar", b"BZh91AY&SY", r"x\.tar is bzip2 under another name"),
        (
            "x.tar",
            b"version https://git-lfs.github.com/spec/v1\n",
            "Git LFS pointer, .*git lfs pull",
        ),
        ("x.tar", b"\n<!DOCTYPE html><html>", r"x\.tar is a web page"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_what_is_no_tar_is_refused_by_name(tmp_path, name, content, message, alone):
    (tmp_path / name).write_bytes(content)
    if not alone:
        write_tar(tmp_path / "0.tar", [("a.png", png()), ("a.txt", "a")])
    with pytest.raises(ValueError, match=r"training\.dataset_path: .*" + message):
        source(tmp_path)
    with pytest.raises(ValueError, match=message):
        source(tmp_path / name)


def test_pipes_are_left_out(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", png()), ("a.txt", "a")])
    os.mkfifo(tmp_path / "1.tar")
    items = source(tmp_path)
    assert rows(items) == [("0.tar/a", ("a",), "")]
    assert [tuple(note) for note in items.index.notes] == [
        ("files left out, each is a pipe", 1, 0, ("1.tar",))
    ]
    with pytest.raises(ValueError, match=r"1\.tar holds no shard: .*is a pipe"):
        source(tmp_path / "1.tar")


def test_folders_that_are_not_listed_and_names_that_are_no_text(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_tar(tmp_path / name / "0.tar", [("0.png", png()), ("0.txt", name)])
    (tmp_path / os.fsdecode(b"\xff.tar")).write_bytes(b"")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr("torchtitan_flux.data.sources.index_cache.can_open", lambda path, at: False)
    items = source(tmp_path)
    assert rows(items) == [("a/0.tar/0", ("a",), "")]
    found = {note.text: note.examples for note in items.index.notes}
    assert found == {
        "files whose names are not UTF-8 are left out": (str(tmp_path),),
        "files or folders that cannot be opened: Permission denied": (str(tmp_path / "b"),),
    }
    monkeypatch.undo()
    assert len(source(tmp_path)) == 2


def test_what_the_system_says_of_the_path_is_a_refusal(tmp_path):
    with pytest.raises(ValueError, match=r"training\.dataset_path: .*: File name too long"):
        source(tmp_path / ("x" * 300))


def built(path: Path, split: Split = "train", **options) -> Source:
    return build_source("webdataset", split, SourceOptions(path=str(path), **options))


def test_shards_are_parted_as_tables_are(tmp_path):
    names = ["train-0", "train-1", "val/0", "test-0", "extra"]
    for name in names:
        write_tar(tmp_path / f"{name}.tar", [("a.png", png()), ("a.txt", name)])
    train, held_out = (
        built(tmp_path, split, held_out_share=0.5) for split in ("train", "held_out")
    )
    assert [train[i].item_id for i in range(len(train))] == ["train-0.tar/a", "train-1.tar/a"]
    assert [held_out[i].item_id for i in range(len(held_out))] == ["val/0.tar/a"]
    assert isinstance(train, IndexedSource)
    assert sorted(note.examples for note in train.index.notes) == [("extra.tar",), ("test-0.tar",)]
    (tmp_path / "val" / "0.tar").unlink()
    assert built(tmp_path, "held_out")[0].item_id == "test-0.tar/a"
    (tmp_path / "test-0.tar").unlink()
    assert len(built(tmp_path)) == 3  # no held-out part: nothing is left out
    with pytest.raises(ValueError, match="has no validation or test part: name"):
        built(tmp_path, "held_out", validates_training_data=True)
    assert len(built(tmp_path, "held_out", validates_training_data=True, held_out_share=0.3)) == 1
