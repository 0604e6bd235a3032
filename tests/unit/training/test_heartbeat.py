"""Beats of ranks, as the launcher reads them."""

import time

import pytest

from torchtitan_flux.training.heartbeat import FOLDER, Heartbeat, read_beats


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    return tmp_path


def test_the_last_beat_is_read(folder):
    heartbeat = Heartbeat()
    assert read_beats(folder) == {}, "no sign yet"
    begin = time.time()
    heartbeat.beat(0, "starting")
    assert read_beats(folder)[3].place == "while starting"
    heartbeat.beat(12, "forward/backward")
    beat = read_beats(folder)[3]
    assert (beat.rank, beat.step, beat.phase, beat.left) == (3, 12, "forward/backward", None)
    assert beat.place == "in step 12 (forward/backward)"
    assert begin <= beat.time <= time.time()


def test_the_trainer_goes_on_in_the_file_that_the_entry_began(folder):
    first = Heartbeat()
    first.beat(0, "starting")
    second = Heartbeat()
    assert read_beats(folder)[3].phase == "starting"
    second.beat(7, "data")
    first.leave(2)
    beat = read_beats(folder)[3]
    assert (beat.step, beat.phase, beat.left) == (7, "data", 2)


def test_without_a_launcher_it_does_nothing(monkeypatch, tmp_path):
    monkeypatch.delenv(FOLDER, raising=False)
    Heartbeat().beat(1, "data")
    Heartbeat().leave(0)
    monkeypatch.setenv(FOLDER, str(tmp_path / "gone"))
    Heartbeat().beat(1, "data")


def test_other_files_of_the_folder_are_passed_over(folder):
    (folder / "rank-x").write_text("")
    (folder / "rank-1").write_text("short")
    assert read_beats(folder) == {}
