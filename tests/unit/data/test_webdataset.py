"""Tar shards read at random: which members are a sample, what is said of those that are none."""

import os
import subprocess
import sys
import tarfile
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
    write_tar,
)

from torchtitan_flux.data.sources.captions import NO_CAPTION
from torchtitan_flux.data.sources.indexed import IndexedSource
from torchtitan_flux.data.sources.listing import LEFT_OUT
from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import SourceOptions
from torchtitan_flux.data.sources.webdataset import ALONE, CUT, DAMAGED, DOTTED, ODD, UNCLEAR

ROOT = Path(__file__).parents[3]
ASSETS = ROOT / "tests" / "assets"


def numbered(path: Path, count: int, start: int = 0) -> bytes:
    """A shard of samples with a .png and a .txt each."""
    members = []
    for n in range(start, start + count):
        members += [(f"{n:04d}.png", png(n)), (f"{n:04d}.txt", f"no. {n}")]
    return write_tar(path, members).read_bytes()


def source(path: Path | str, **options) -> IndexedSource:
    return indexed("webdataset", path, **options)


def of(folder: Path, *members: tuple[str, bytes | str], **options) -> IndexedSource:
    return source(write_tar(folder / "x.tar", members), **options)


def offsets(shard: Path) -> list[int]:
    with tarfile.open(shard) as tar:
        return [member.offset for member in tar]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_random_access_with_names_that_take_headers_of_their_own(tmp_path, format):
    wanted = []
    for shard in range(2):
        members = []
        for number in range(6):
            key = f"fold.er/{'long' * 40 * (number % 2)}ü{shard}{number}"
            members += [(f"{key}.PNG", png(20 * number)), (f"{key}.txt", f"no. {number}")]
            members.append((f"{key}.npy.gz", b"of no use"))
            wanted.append((f"{shard:02d}.tar/{key}", (f"no. {number}",), 20 * number))
        write_tar(tmp_path / f"{shard:02d}.tar", members, format)
    items = source(tmp_path)
    read = [items[index] for index in reversed(range(len(items)))]
    found = [(item.item_id, item.captions, item.image.getpixel((0, 0))) for item in read]
    assert found == wanted[::-1]


def test_captions_come_from_text_or_json_in_any_case_and_spelling(tmp_path):
    both = '{"caption": "from json", "alt": "other"}'
    samples = {
        "both": ({"TXT": "from txt", "json": both}, ("from txt",)),
        "blank": ({"txt": " ", "JSON": both}, ("from json",)),
        "json": ({"json": '{"prompt": "p", "captions": ["a", "b"], "text": ""}'}, ("a", "b")),
        "txt": ({"txt": "\ufeffa text"}, ("a text",)),
        "caption": ({"caption": "c"}, ("c",)),
        "second": ({"caption": "not this", "json": '{"caption": "this"}'}, ("this",)),
        "width": ({"json": '{"width": 3}', "txt": "the text counts"}, ("the text counts",)),
        "none": ({"txt": "", "json": "{"}, "its .json is no JSON"),
        "café": ({"txt": "coffee"}, ("coffee",)),
    }
    members = []
    for key, (files, _) in samples.items():
        members += [(f"{key}.PNG", png()), *((f"{key}.{end}", text) for end, text in files.items())]
    items = of(tmp_path, *members)
    assert captions(items) == {f"x.tar/{key}": texts for key, (_, texts) in samples.items()}
    assert not notes(items)
    items = source(tmp_path, caption_column="alt")
    found = captions(items)
    assert found["x.tar/both"] == found["x.tar/blank"] == ("other",)
    assert found["x.tar/json"] == "its .json has no 'alt'"
    assert found["x.tar/txt"] == ("a text",)


def test_texts_that_cannot_be_read(tmp_path):
    texts = {
        '{"caption": ': "its .json is no JSON",
        "[" * 100_000: "its .json is no JSON",
        '["a list"]': "its .json is no JSON object",
        '{"caption": {"a": 3}}': NO_CAPTION,
        '{"caption": "half \\ud800 a pair"}': ("half ? a pair",),
    }
    members = [("only text.txt", "x"), ("only json.json", "{}"), ("z.xyz", ""), ("z.txt", "")]
    for number, text in enumerate(texts):
        members += [(f"{number}.png", png()), (f"{number}.json", text)]
    items = of(tmp_path, *members, ("x.png", png()), ("x.txt", b"\xff"))
    assert list(captions(items).values()) == [*texts.values(), "its .txt is not UTF-8"]
    assert notes(items) == {ALONE: ("x.tar/only text", "x.tar/only json", "x.tar/z")}


def test_a_key_ends_at_the_first_dot_and_what_follows_is_counted(tmp_path):
    dotted = ("2024.05.17.png", "2024.05.17.txt", "Mr. Fox.PNG", "Mr. Fox.txt")
    plain = {"plain": ("p",), "fold.er/deep": ("d",)}
    members = [(name, png() if name[-3:].lower() == "png" else "q") for name in dotted]
    for key, (text,) in plain.items():
        members += [(f"./{key}.png", png()), (f"{key}.txt", text)]
    members += [("plain.seg.png", png(7)), (".hidden.txt", ""), ("README", "")]
    items = of(tmp_path, *members)
    assert captions(items) == {f"x.tar/{key}": texts for key, texts in plain.items()}
    assert items[0].image.getpixel((0, 0)) == 0
    assert notes(items) == {DOTTED: tuple(f"x.tar/{n}" for n in (*dotted, "plain.seg.png"))}


FIRST, AGAIN = (("0.png", png(1)), ("0.txt", "a")), (("0.txt", "c"), ("0.png", png(3)))
BETWEEN = (("1.png", png(2)), ("1.txt", "b"))


def test_members_of_a_sample_may_stand_apart(tmp_path):
    apart = (FIRST[0], BETWEEN[0], FIRST[1], BETWEEN[1])
    assert list(captions(of(tmp_path, *apart)).values()) == [("a",), ("b",)]


@pytest.mark.parametrize(
    "members",
    [
        (*FIRST, *AGAIN),  # neighbours
        (*FIRST, *BETWEEN, *AGAIN),  # each whole
        (*FIRST, *BETWEEN, ("0.txt", "c")),  # two texts
        (("0.jpg", png(1)), ("0.png", png(2)), ("0.txt", "a")),  # two pictures
    ],
)
def test_a_repeated_key_is_one_unreadable_item(tmp_path, members):
    items = of(tmp_path, *members)
    found = captions(items)
    assert found.pop("x.tar/1", ("b",)) == ("b",)
    assert found == {"x.tar/0": UNCLEAR}
    assert unreadable(items, 0) == UNCLEAR


def test_the_suffix_of_pictures_can_be_named(tmp_path):
    of(tmp_path, ("0.jpg", png(1)), ("0.png", png(2)), ("0.seg.PNG", png(3)), ("0.txt", "a"))
    for number, suffix in enumerate(("jpg", ".PNG", "seg.png"), 1):
        items = source(tmp_path, image_column=suffix)
        assert captions(items) == {"x.tar/0": ("a",)}
        assert items[0].image.getpixel((0, 0)) == number
    refuses("webdataset", tmp_path, "hold no pictures; .*samples without", image_column="webp")


def test_links_and_names_that_are_not_utf8_are_noted(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("0.png", png()), ("0.txt", "a")])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("\udcff.png"))
    items = source(path)
    assert captions(items) == {"x.tar/0": ("a",)}
    assert notes(items) == {ODD: ("x.tar/2.png", "x.tar/?.png")}


def test_a_cut_shard_is_used_up_to_the_cut(tmp_path):
    shard = tmp_path / "x.tar"
    data = numbered(shard, 6)
    at = offsets(shard)
    for length, whole, cut, damage in (
        (at[4] + 512 + 20, 2, 1, "unexpected end of data"),
        (at[4] + 100, 2, 0, "ends without the mark"),
        (at[-1] + 1024, 6, 0, "ends without the mark"),
    ):
        shard.write_bytes(data[:length])
        items = source(tmp_path)
        assert damage in notes(items)[DAMAGED][0]
        assert [items[i].captions for i in range(whole)] == [(f"no. {i}",) for i in range(whole)]
        assert [row.reason for row in rows(items)[whole:]] == [CUT] * cut
    shard.write_bytes(data[: at[2] + 512 + 20])  # the shard shrinks while it is in use
    assert unreadable(items, 1) == CUT
    shard.unlink()
    assert unreadable(items, 0) == "does not exist"


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path):
    shard = tmp_path / "x.tar"
    data = bytearray(numbered(shard, 4))
    at = offsets(shard)[4]
    header = bytearray(data[at : at + 512])
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)  # GNU's binary notation
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    whole = bytes(data)
    for content, count, what in (
        (data[:at] + b"?" * 512 + data[at + 512 :], 2, f"no tar header at byte {at}"),
        (data[:at] + header + data[at + 512 :], 2, f"negative size at byte {at}"),
        (whole + whole, 4, "bytes follow the end of the tar"),
    ):
        shard.write_bytes(content)
        items = source(tmp_path)
        assert len(items) == count
        assert what in notes(items)[DAMAGED][0]


def test_which_shards_a_path_means(tmp_path):
    for number, name in enumerate(["00.tar", "01.tar", "02.tar", "deep/03.TAR", ".hid/04.tar"]):
        numbered(tmp_path / name, 1, number)
    for path, shards in {
        "": ["00.tar", "01.tar", "02.tar", "deep/03.TAR"],
        "/01.tar": ["01.tar"],
        "/{02..00}.tar": ["02.tar", "01.tar", "00.tar"],
        "/0[12].tar": ["01.tar", "02.tar"],
        "/{deep/03.TAR,00.tar}": ["deep/03.TAR", "00.tar"],
        "/*/*.TAR": ["03.TAR"],
    }.items():
        assert [name.rpartition("/")[0] for name in ids(source(f"{tmp_path}{path}"))] == shards


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tar.gz", b"", r"x\.tar\.gz: compressed .* unpack"),
        ("x.tgz", b"", r"x\.tgz: compressed .* unpack"),
        ("X.TAR.ZST", b"", r"X\.TAR\.ZST: compressed .* unpack"),
        ("x.tar", b"\x1f\x8b\x08", r"x\.tar is gzip under another name: unpack"),
        ("x.tar", b"", r"x\.tar is empty"),
    ],
)
def test_what_is_no_tar_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    numbered(tmp_path / "0.tar", 1)
    for path in (tmp_path, tmp_path / name):
        refuses("webdataset", path, message)


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("webdataset", "https://x.org/{0..9}.tar", "0.tar does not exist; .*download"),
        ("webdataset", "{tmp}/*.tgz", "no file matches"),
        ("webdataset", "{tmp}/x.tar", "1 tar files .* hold no pictures; samples without .*/a"),
        ("webdataset", "{tmp}/1.tar", r"1\.tar is no file"),
        ("cc12m-wds", None, "hf download pixparse/cc12m-wds .* --local-dir"),
        ("coco-validation", None, "hf download howard-hou/COCO-Text .* --local-dir"),
    ],
)
def test_what_is_no_shard_is_refused(tmp_path, name, path, message):
    os.mkfifo(tmp_path / "1.tar")
    write_tar(tmp_path / "x.tar", [("a.txt", "x")])
    refuses(name, path and path.replace("{tmp}", str(tmp_path)), message)


def test_what_is_left_out_of_a_folder_is_noted(tmp_path, refused):
    for name in ("a", "b"):
        numbered(tmp_path / name / "0.tar", 1)
    os.mkfifo(tmp_path / "1.tar")
    (tmp_path / os.fsdecode(b"\xff.tar")).write_bytes(b"")
    refused.add("b")
    items = source(tmp_path)
    assert ids(items) == ["a/0.tar/0000"]
    assert set(notes(items)[LEFT_OUT]) == {"1.tar", "?.tar", "b: Permission denied"}
    refused.clear()
    assert len(source(tmp_path)) == 2
    refused.add("0.tar")
    (tmp_path / "1.tar").unlink()
    refuses("webdataset", tmp_path, r"0\.tar cannot be opened: Permission denied")


def test_the_torchtitan_name_reads_the_committed_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = SourceOptions(index_folder=tmp_path)
    items = build_source("cc12m-test", "train", options)
    assert len(items) == 32
    assert items[31].item_id == "cc12m-train-0000.tar/000000031"
    assert len({items[i].image.size for i in range(32)}) == 4
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
    written = [file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) == 3
    for file in written:
        assert (tmp_path / file).read_bytes() == (ASSETS / file).read_bytes(), file
