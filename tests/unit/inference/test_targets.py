"""Where pictures go, and what is refused of it before anything is drawn."""

from argparse import Namespace
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest

from torchtitan_flux.image_file import FORMATS
from torchtitan_flux.inference import targets as module
from torchtitan_flux.inference.picture import Picture
from torchtitan_flux.inference.targets import check_paths, targets
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.sampling.generate import SampleSettings

CONFIG = Path("run/img.v1")
TWO = ("a", "ein Füchslein")


def paths(out: str | None, prompts=("a",), count=1, from_png: str | None = None) -> list[Path]:
    settings = SampleSettings(ImageSize(8, 8), 1)
    options = Namespace(out=out, from_png=from_png, recorded=from_png, count=count)
    pictures = [
        Picture(one, "", settings, i) for i, one in enumerate(prompts) for _ in range(count)
    ]
    return targets(options, CONFIG, pictures)


def names(*given) -> str:
    return " ".join(path.name for path in paths(*given))


def test_a_folder_names_pictures_by_number_and_caption(tmp_path):
    assert paths(None) == [CONFIG / "0000-a.png"]
    assert names(str(tmp_path), TWO) == "0000-a.png 0001-ein-füchslein.png"
    assert names(None, "ab", 2) == "0000-a-1.png 0000-a-2.png 0001-b-1.png 0001-b-2.png"
    assert paths(None, from_png="there/x.webp") == [CONFIG / "x-again.webp"]
    assert paths(None, from_png="there/x.download") == [CONFIG / "x-again.png"]
    (tmp_path / "folder.png").mkdir()
    for out in (f"{tmp_path}/v1.5", f"{tmp_path}/v1.gif/", f"{tmp_path}/folder.png", "plain"):
        assert paths(out) == [Path(out) / "0000-a.png"]


@pytest.mark.parametrize("suffix", [*FORMATS, ".PNG", ".Jpg"])
def test_a_file_is_of_its_suffix_and_is_numbered_where_there_are_several(suffix):
    assert paths(f"new/b.c{suffix}") == [Path(f"new/b.c{suffix}")]
    assert paths(f"new/b{suffix}", TWO) == [Path(f"new/b-1{suffix}"), Path(f"new/b-2{suffix}")]
    assert paths(f"b{suffix}", "ab", 2)[-1] == Path(f"b-4{suffix}")


@pytest.mark.parametrize("name", ["c.gif", "c.TIFF", "c.avif", "c.pgn", "c.jpge", "c.jp2"])
def test_other_formats_are_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=rf"--out {name}: .*\.png, \.jpg, \.jpeg, \.webp.*{name}/"):
        paths(name)


def test_existing_files_are_kept_unless_overwritten(tmp_path):
    old, new, folder = tmp_path / "old.png", tmp_path / "new.png", tmp_path / "folder.png"
    old.touch()
    folder.mkdir()
    link = tmp_path / "link.png"
    link.symlink_to("nowhere")
    check_paths([new], overwrite=False)
    check_paths([old, link], overwrite=True)
    with pytest.raises(ValueError, match=r"old\.png exists already: --overwrite .* --out"):
        check_paths([new, old], overwrite=False)
    with pytest.raises(ValueError, match=r"exists already, and 1 more"):
        check_paths([old, link], overwrite=False)
    for overwrite in (True, False):
        with pytest.raises(ValueError, match=r"folder\.png is a folder"):
            check_paths([folder], overwrite)


def test_a_pillow_without_webp_is_known_before(monkeypatch):
    monkeypatch.setattr(module.features, "check", lambda name: False)
    with pytest.raises(ValueError, match=r"no WebP; use \.png"):
        paths("a.webp")


def test_what_cannot_be_written_is_known_before(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    for path in (
        *(plain / "x.png", plain / "deep" / "x.png", Path("/proc/seven.png")),
        *(tmp_path / f"{'x' * n}.png" for n in (240, 300)),
        *paths(f"{tmp_path}/{'x' * 300}/"),
    ):
        with pytest.raises(ValueError, match=r"cannot be written \(.+\).* --out"):
            check_paths([path], overwrite=False)
    check_paths([tmp_path / "new" / "deep" / "x.png", tmp_path / "y.png"], overwrite=False)
    assert list(tmp_path.iterdir()) == [plain], "nothing is left behind"
