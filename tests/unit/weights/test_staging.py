"""Where an export goes: one writer at a time, and nothing of anybody else's is lost."""

import os
import shutil
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest

from torchtitan_flux import files as durable
from torchtitan_flux.weights.staging import TargetRefused, staged


def export(target: Path, content: str = "new", **named) -> None:
    """A folder with a file, or a file."""
    named = {"overwrite": False, "reads": [], **named}
    with staged(target, 1, **named) as stage:
        if target.suffix:
            (stage / target.name).write_text(content)
        else:
            (stage / target.name).mkdir()
            (stage / target.name / "config.json").write_text(content)
        for name in named.get("beside", ()):
            (stage / name).write_text(content)


def held(folder: Path) -> dict[str, str]:
    files = (one for one in folder.rglob("*") if one.is_file())
    return {str(one.relative_to(folder)): one.read_text() for one in files}


def test_a_second_export_to_the_same_target_is_refused_and_spoils_nothing(tmp_path):
    target = tmp_path / "new" / "out"
    with staged(target, 1, False, []) as stage:
        (stage / "out").mkdir()
        (stage / "out" / "config.json").write_text("half of")
        with pytest.raises(TargetRefused, match=r"out is being written by another process; wait"):
            export(target, "the other's")
        (stage / "out" / "config.json").write_text("all of it")
    assert held(tmp_path) == {"new/out/config.json": "all of it"}
    export(target, "again", overwrite=True)  # it is free again


def test_a_folder_that_its_writer_removes_meanwhile_is_not_taken(tmp_path, monkeypatch):
    """The other process is done between this one's opening the folder and its lock."""
    real = durable.fcntl.flock

    def flock(descriptor, operation):
        shutil.rmtree(tmp_path / "out.partial")
        real(descriptor, operation)

    monkeypatch.setattr(durable.fcntl, "flock", flock)
    with pytest.raises(TargetRefused, match="being written by another process"):
        export(tmp_path / "out")


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError("no locks available")

    monkeypatch.setattr(durable.fcntl, "flock", flock)
    export(tmp_path / "out")


def test_somebody_was_faster(tmp_path):
    def late():
        with staged(tmp_path / "late", 1, False, []) as stage:
            (stage / "late").write_text("second")
            (tmp_path / "late").write_text("first")

    with pytest.raises(TargetRefused, match="late exists"):
        late()
    assert (tmp_path / "late").read_text() == "first"


def test_what_no_export_left_is_not_cleared(tmp_path):
    stage = tmp_path / "out.partial"
    stage.mkdir()
    for name in ("out.SHA256SUMS", "thesis.txt"):
        (stage / name).write_text("only copy")
    with pytest.raises(TargetRefused, match=r"out\.partial holds thesis\.txt, which no export"):
        export(tmp_path / "out")
    assert (stage / "thesis.txt").read_text() == "only copy"
    (stage / "thesis.txt").unlink()
    export(tmp_path / "out")  # what a killed export left goes
    assert held(tmp_path) == {"out/config.json": "new"}
    stage.write_text("a file")
    with pytest.raises(TargetRefused, match=r"out\.partial is in the way; move it"):
        export(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_interrupted_between_the_old_and_the_new(tmp_path, monkeypatch, error):
    """Signals become exceptions: the one that was there comes back."""
    export(tmp_path / "out", "old")
    real = Path.rename

    def rename(self, to):
        if self == tmp_path / "out.partial" / "out":
            raise error
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(type(error)):
        export(tmp_path / "out", overwrite=True)
    assert held(tmp_path) == {"out/config.json": "old"}


def test_killed_between_the_old_and_the_new(tmp_path):
    export(tmp_path / "out", "old")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out").rename(tmp_path / "out.partial" / "replaced")
    with pytest.raises(TargetRefused, match="out exists"):
        export(tmp_path / "out")
    assert held(tmp_path) == {"out/config.json": "old"}


def test_what_is_read_is_not_replaced(tmp_path):
    """Neither what holds it nor what lies in it, by its name or by where a link leads."""
    outer, store = tmp_path / "outer", tmp_path / "store"
    for folder in (outer, outer / "inner", outer / "inner" / "innermost", store):
        export(folder)
    (store / "weights").write_text("precious")
    linked = tmp_path / "linked"  # as in a cache of Hugging Face: names here, contents elsewhere
    (linked / "transformer").mkdir(parents=True)
    (linked / "transformer" / "weights").symlink_to(store / "weights")
    (tmp_path / "alias").symlink_to(outer)
    before = held(tmp_path)
    inner = outer / "inner"
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
    target, names = tmp_path / "a.safetensors", ["a.README.md", "a.SHA256SUMS"]
    (tmp_path / "a.README.md").write_text("written by hand")
    with pytest.raises(TargetRefused, match=r"a\.README\.md exists; .* --overwrite"):
        export(target, beside=names)
    assert held(tmp_path) == {"a.README.md": "written by hand"}
    (tmp_path / "a.LICENSE").write_text("of the earlier one")
    (tmp_path / "a.png").write_text("not of an export")
    outdated = ["a.LICENSE", "a.README.md", "a.gone"]
    export(target, overwrite=True, beside=names, outdated=outdated)
    assert held(tmp_path) == {one: "new" for one in (target.name, *names)} | {
        "a.png": "not of an export"
    }
    assert os.listdir(tmp_path).count("a.safetensors.partial") == 0
