"""Walking folders, expanding patterns."""

import pytest

from torchtitan_flux.data.sources.listing import expand_braces, foreign_content, matches, walk


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


def test_patterns_find_what_exists_and_braces_spell_out(tmp_path):
    for name in ("b.tar", "a.tar", "a.txt"):
        (tmp_path / name).write_text("")
    assert [p.name for p in matches(f"{tmp_path}/*.tar")] == ["a.tar", "b.tar"]
    assert [p.name for p in matches(f"{tmp_path}/{{c,b,a}}.tar")] == ["c.tar", "b.tar", "a.tar"]
    assert [p.name for p in matches(f"{tmp_path}/{{b*,?}}.tar")] == ["b.tar", "a.tar"]
    assert matches(f"{tmp_path}/x*.tar") == []


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
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a Git LFS pointer, run `git lfs pull`",
        ),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"\xef\xbb\xbf<html>", "is a web page"),
        (b"\x1f\x8b\x08", "is gzip under another name: unpack"),
        (b"BZh91AY&SY", "is bzip2 under another name"),
        (b"BZh is a name", ""),
        (b"ARROW1\0\0", "is an Arrow file for random access (Feather)"),
        (b"PAR1 and nothing", "is a parquet file under another name"),
        (b"anything", ""),
    ],
)
def test_what_a_file_is_instead(head, what):
    found = foreign_content(head, "x.tar")
    assert found.startswith(what)
    assert bool(found) == bool(what)
