"""Where an export goes: complete or not there, and nothing of anybody else's is lost."""

from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest

from torchtitan_flux.weights.staging import TargetRefused, staged


def export(target: Path, content: str = "new", beside: tuple[str, ...] = ()) -> None:
    """A folder with a file, or a file."""
    with staged(target, 1, beside) as stage:
        path = stage / target.name
        if not target.suffix:
            path.mkdir()
            path /= "config.json"
        path.write_text(content)
        for name in beside[:1]:
            (stage / name).write_text(content)


def held(folder: Path) -> dict[str, str]:
    files = (one for one in folder.rglob("*") if one.is_file())
    return {str(one.relative_to(folder)): one.read_text() for one in files}


def test_the_one_that_comes_second_is_refused_and_spoils_nothing(tmp_path):
    target = tmp_path / "new" / "out"

    def late():
        with staged(target, 1) as stage:
            (stage / "out").write_text("second")
            export(target, "first")

    for second in (late, lambda: export(target, "again")):
        with pytest.raises(TargetRefused, match="out exists; delete it"):
            second()
        assert held(tmp_path) == {"new/out/config.json": "first"}


def test_links_count_and_empty_folders_do_not(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(TargetRefused, match="link exists"):
        export(tmp_path / "link")
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty")
    assert held(tmp_path) == {"empty/config.json": "new"}
    (tmp_path / "a.safetensors").mkdir()  # a file cannot take its place
    with pytest.raises(TargetRefused, match=r"a\.safetensors exists"):
        export(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["a.README.md", "a.LICENSE"])
def test_files_beside_a_single_one(tmp_path, name):
    """Also those that are not made again: they would be taken for the new file's."""
    beside = ("a.README.md", "a.LICENSE")
    (tmp_path / name).write_text("written by hand")
    with pytest.raises(TargetRefused, match=f"{name} exists"):
        export(tmp_path / "a.safetensors", beside=beside)
    assert held(tmp_path) == {name: "written by hand"}
    (tmp_path / name).unlink()
    export(tmp_path / "a.safetensors", beside=beside)
    assert held(tmp_path) == {"a.safetensors": "new", "a.README.md": "new"}
