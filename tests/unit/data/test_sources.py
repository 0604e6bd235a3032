"""Names of data sets, the held-out share, walking folders, expanding patterns."""

import pickle

import pytest

from torchtitan_flux.data.sources.listing import expand_braces, foreign_content, walk
from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import SourceOptions, UnreadableItem
from torchtitan_flux.data.sources.split import SourcePart
from torchtitan_flux.latents import ImageSize


@pytest.mark.parametrize(("name", "size"), [("digits", (8, 8)), ("shapes", (24, 16))])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_builds_the_known_sources(name, size, split):
    source = build_source(name, split, SourceOptions(image_size=ImageSize(16, 24)))
    assert (source.name, source[0].image.size) == (name, size)


def test_unknown_names_say_which_key_and_what_is_known():
    message = "^validation.dataset: unknown data set 'digit'; known: .*digits, .*"
    with pytest.raises(ValueError, match=message):
        build_source("digit", "held_out")


def test_unreadable_item_survives_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(UnreadableItem("folder/a.jpg", "truncated")))
    assert (error.item_id, error.reason) == ("folder/a.jpg", "truncated")
    assert str(error) == "folder/a.jpg: truncated"


@pytest.mark.parametrize("length", [2, 3, 5, 7, 10, 101, 997])
@pytest.mark.parametrize("share", [1e-9, 0.1, 1 / 3, 0.5, 0.999999])
def test_the_parts_are_disjoint_and_together_everything(make_source, length, share):
    source = make_source(length)
    train, held_out = (SourcePart(source, split, share) for split in ("train", "held_out"))
    rows = [[part.row(i) for i in range(len(part))] for part in (train, held_out)]
    assert sorted(rows[0] + rows[1]) == list(range(length))
    assert min(len(train), len(held_out)) >= 1
    assert abs(len(held_out) - share * length) <= 1
    assert [held_out[i].item_id for i in range(len(held_out))] == [f"grays/{i}" for i in rows[1]]


def test_is_the_same_in_every_run_and_not_a_range(make_source):
    part = SourcePart(make_source(97), "held_out", 0.1)
    rows = [part.row(i) for i in range(len(part))]
    assert rows == [pickle.loads(pickle.dumps(part)).row(i) for i in range(len(part))]
    assert rows == [SourcePart(make_source(97), "held_out", 0.1).row(i) for i in range(len(part))]
    assert rows != sorted(rows)
    assert max(rows) - min(rows) > 48
    for beyond in (-1, len(part)):
        with pytest.raises(IndexError):
            part[beyond]


@pytest.mark.parametrize(
    ("length", "share", "message"),
    [(1, 0.5, "a data set of 1 items"), (9, 1.5, r"1\.5 is not in"), (9, 0.0, r"0\.0 is not in")],
)
def test_refuses_by_key(make_source, length, share, message):
    with pytest.raises(ValueError, match=rf"^data\.held_out_share: {message}"):
        SourcePart(make_source(length), "train", share)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{00008..00011}.tar", ["00008.tar", "00009.tar", "00010.tar", "00011.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{-1..1}", ["-1", "0", "1"]),
        ("x{b,a,}y", ["xby", "xay", "xy"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{a,b{1..3}}c", ["ac", "b1c", "b2c", "b3c"]),
        ("{a}-{0..1}", ["{a}-0", "{a}-1"]),
        ("{}{a,b", ["{}{a,b"]),
    ],
)
def test_braces_mean_what_they_mean_to_the_shell(pattern, names):
    assert expand_braces(pattern) == names


def test_walk_is_sorted_follows_links_and_ignores_what_is_hidden(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in ("b/deep", "a", ".hidden", "index"):
        (root / folder).mkdir(parents=True)
    elsewhere.mkdir()
    for file in ("b/2", "b/10", "b/deep/x", "a/ü", ".hidden/x", ".x", "z", "index/x"):
        (root / file).write_text("")
    (elsewhere / "linked").write_text("")
    (root / "link").symlink_to(elsewhere)
    (root / "b" / "loop").symlink_to(root)
    (root / "gone").symlink_to(tmp_path / "nowhere")
    found = list(walk(root, without=root / "index"))
    assert [directory.name for directory in found] == ["", "a", "b", "b/deep", "link"]
    paths = [path for directory in found for path in directory.paths()]
    assert paths == ["gone", "z", "a/ü", "b/10", "b/2", "b/deep/x", "link/linked"]


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, run `git lfs"),
        (b"\xef\xbb\xbf<html>", "is a web page"),
        (b"\x1f\x8b\x08", "is gzip under another name: unpack"),
        (b"BZh91AY&SY", "is bzip2 under another name"),
        (b"BZh is a name", ""),
        (b"ARROW1\0\0", "is an Arrow file for random access (Feather)"),
        (b"PAR1 and nothing", "is a parquet file under another name"),
    ],
)
def test_what_a_file_is_instead(head, what):
    found = foreign_content(head, "x.tar")
    assert found.startswith(what)
    assert bool(found) == bool(what)
