"""Where an export goes: complete or not there, and nothing of anybody else's is lost."""

from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest

from torchtitan_flux.weights.staging import TargetRefused, staged


def export(target: Path, content: str = "new") -> None:
    """A folder with a file, or a file."""
    with staged(target, "bfl" if target.suffix else "diffusers", 1) as path:
        if not target.suffix:
            path.mkdir()
            path /= "config.json"
        path.write_text(content)


def held(folder: Path) -> dict[str, str]:
    files = (one for one in folder.rglob("*") if one.is_file())
    return {str(one.relative_to(folder)): one.read_text() for one in files}


def test_the_one_that_comes_second_is_refused_and_spoils_nothing(tmp_path):
    target = tmp_path / "new" / "out"

    def late():
        with staged(target, "diffusers", 1) as path:
            path.write_text("second")
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
