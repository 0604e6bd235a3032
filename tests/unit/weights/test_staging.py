"""Where an export goes: complete or not there, and nothing of anybody else's is lost."""

from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest

from torchtitan_flux.weights.staging import TargetRefused, staged


def export(target: Path, content: str = "new", beside: tuple[str, ...] = (), **named) -> None:
    """A folder with a file, or a file."""
    with staged(target, 1, **{"overwrite": False, "reads": [], **named}) as stage:
        if target.suffix:
            (stage / target.name).write_text(content)
        else:
            (stage / target.name).mkdir()
            (stage / target.name / "config.json").write_text(content)
        for name in beside:
            (stage / name).write_text(content)


def held(folder: Path) -> dict[str, str]:
    files = (one for one in folder.rglob("*") if one.is_file())
    return {str(one.relative_to(folder)): one.read_text() for one in files}


def test_the_one_that_comes_second_is_refused_and_spoils_nothing(tmp_path):
    target = tmp_path / "new" / "out"

    def late():
        with staged(target, 1, False, []) as stage:
            (stage / "out").write_text("second")
            export(target, "first")

    with pytest.raises(TargetRefused, match="out exists"):
        late()
    assert held(tmp_path) == {"new/out/config.json": "first"}
    export(target, "again", overwrite=True)
    assert held(tmp_path) == {"new/out/config.json": "again"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_interrupted_between_the_old_and_the_new(tmp_path, monkeypatch, error):
    """Signals become exceptions: the one that was there comes back."""
    export(tmp_path / "out", "old")
    real = Path.rename

    def rename(self, to):
        if self.parent.suffix == ".partial" and self.name == "out":
            raise error
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(type(error)):
        export(tmp_path / "out", overwrite=True)
    assert held(tmp_path) == {"out/config.json": "old"}


def test_a_folder_that_no_export_left_is_not_replaced(tmp_path):
    (tmp_path / "diary").mkdir()
    export(tmp_path / "diary", overwrite=True)  # there was nothing in it
    (tmp_path / "diary" / "config.json").rename(tmp_path / "diary" / "monday.txt")
    with pytest.raises(TargetRefused, match="no earlier export"):
        export(tmp_path / "diary", overwrite=True)
    assert held(tmp_path) == {"diary/monday.txt": "new"}


def test_what_is_read_is_not_replaced(tmp_path):
    """Neither what holds it nor what lies in it, by its name or by where a link leads."""
    outer, store = tmp_path / "outer", tmp_path / "store"
    inner = outer / "inner"
    for folder in (outer, inner, inner / "innermost", store):
        export(folder)
    (store / "weights").write_text("precious")
    linked = tmp_path / "linked"  # as in a cache of Hugging Face: names here, contents elsewhere
    (linked / "transformer").mkdir(parents=True)
    (linked / "transformer" / "weights").symlink_to(store / "weights")
    (tmp_path / "alias").symlink_to(outer)
    before = held(tmp_path)
    for target, read in (
        (inner, outer),
        (outer, inner),
        (inner, inner / "config.json"),
        (inner, tmp_path / "alias" / "inner" / "innermost"),
        (tmp_path / "alias" / "inner", outer),
        (store, linked),
        (store, linked / "transformer" / "weights"),
    ):
        with pytest.raises(TargetRefused, match="holds what is read from"):
            export(target, overwrite=True, reads=[tmp_path / "elsewhere", read])
    assert held(tmp_path) == before
    export(inner, "replaced", overwrite=True, reads=[store])
    assert held(tmp_path)["outer/inner/config.json"] == "replaced"


def test_files_beside_a_single_one(tmp_path):
    target, names = tmp_path / "a.safetensors", ("a.README.md", "a.SHA256SUMS")
    outdated = (*names, "a.LICENSE", "a.gone")
    (tmp_path / "a.README.md").write_text("written by hand")
    with pytest.raises(TargetRefused, match=r"a\.README\.md exists; .* --overwrite"):
        export(target, beside=names, outdated=outdated)
    assert held(tmp_path) == {"a.README.md": "written by hand"}
    (tmp_path / "a.LICENSE").write_text("of the earlier one")
    (tmp_path / "a.png").write_text("not of an export")
    export(target, overwrite=True, beside=names, outdated=outdated)
    assert held(tmp_path) == {one: "new" for one in (target.name, *names)} | {
        "a.png": "not of an export"
    }
