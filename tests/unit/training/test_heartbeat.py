"""Beats of ranks, as the launcher reads them."""

import time

import pytest

from torchtitan_flux.training.heartbeat import FOLDER, Beat, Heartbeat, read_beat


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    return tmp_path


def test_the_last_beat_is_read_from_whoever_wrote_it(folder):
    """The entry module starts the file, the trainer goes on in it, the entry module ends it."""
    first, begin = Heartbeat(), time.monotonic()
    assert read_beat(folder, 3) == Beat()
    assert read_beat(folder, 3).place == "before its first sign"
    first.beat(0, "starting")
    second = Heartbeat()
    assert read_beat(folder, 3).place == "while starting"
    second.beat(12, "forward/backward")
    beat = read_beat(folder, 3)
    assert (beat.place, beat.exit_status) == ("in step 12 (forward/backward)", None)
    assert begin <= beat.time <= time.monotonic()
    first.leave(2)
    beat = read_beat(folder, 3)
    assert (beat.place, beat.exit_status) == ("in step 12 (forward/backward)", 2)


def test_without_a_launcher_it_does_nothing(monkeypatch, folder):
    monkeypatch.setenv(FOLDER, str(folder / "gone"))
    Heartbeat().beat(1, "data")
    monkeypatch.delenv(FOLDER)
    Heartbeat().beat(1, "data")
    Heartbeat().leave(0)
    assert list(folder.iterdir()) == []
