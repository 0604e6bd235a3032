"""The index file, and the agreement of processes on who builds it."""

import json
import logging
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchtitan_flux.data.sources import index as index_module
from torchtitan_flux.data.sources import indexed
from torchtitan_flux.data.sources.index import Index, IndexWriter, Row
from torchtitan_flux.data.sources.indexed import HIDDEN, IndexedSource, index_file, open_index

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _home_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def a_row(number: int) -> Row:
    captions = tuple(f"ünï {number} {k}" for k in range(number % 4))
    return Row(f"d/{number}.jpg", number % 3, number * 10**10, number, 7, 11, captions, "")


def rows(count: int) -> list[Row]:
    return [a_row(number) for number in range(count)]


def written(path: Path, rows: list[Row], facts: dict[str, str] | None = None) -> Index:
    with IndexWriter(path / "x.arrow", facts or {}) as writer:
        for row in rows:
            writer.add(row)
    return Index(path / "x.arrow")


class Numbers(IndexedSource):
    """A source of `rows` rows that notes each time its index is built."""

    name = "numbers"
    title = "some numbers"
    identity = ""
    left_out: dict[str, list[str]] = {}  # noqa: RUF012

    def __init__(self, place: Path, rows: int = 5, seconds: float = 0.0):
        self.place, self.rows, self.seconds = place, rows, seconds

    def facts(self):
        return {"its number of rows": str(self.rows)}

    def read(self, row):
        raise FileNotFoundError

    def build(self, writer, bar):
        with (self.place / "builds").open("a") as file:
            file.write(f"{os.getpid()}\n")
        for row in rows(self.rows):
            writer.add(row)
            bar.update()
        time.sleep(self.seconds)

    @property
    def builds(self) -> int:
        return len((self.place / "builds").read_text().split())


@pytest.mark.parametrize("count", [0, 1, 13, 14, 131])
def test_rows_come_back_one_by_one_over_batch_borders(tmp_path, monkeypatch, count):
    monkeypatch.setattr(index_module, "BATCH_ROWS", 13)
    facts = {"ü": json.dumps(["\udcff", '"'])}
    index = written(tmp_path, rows(count), facts)
    assert len(index) == count
    assert index.facts == facts
    assert [index[i] for i in reversed(range(count))] == rows(count)[::-1]
    for beyond in (-1, count):
        with pytest.raises(IndexError):
            index[beyond]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"garbage" * 100,
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data.replace(b'"format": "', b'"format": "0'),
        lambda data: data.replace(b"torchtitan_flux.index", b"torchtitan_flux.other"),
    ],
)
def test_a_damaged_file_is_told_and_built_anew(tmp_path, caplog, damage):
    recipe = Numbers(tmp_path)
    open_index(recipe)
    file = index_file(recipe, tmp_path / HIDDEN)
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.INFO):
        assert len(open_index(recipe)) == 5
    assert "some numbers is built anew: it is damaged" in caplog.text
    assert recipe.builds == 2


def test_is_built_once_and_again_when_its_facts_have_changed(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    assert [len(open_index(Numbers(tmp_path, count))) for count in (5, 5, 6)] == [5, 5, 6]
    assert re.search(r"Indexed some numbers: 5 items in .* s, kept in ", caplog.text)
    assert "built anew: its number of rows has changed" in caplog.text
    assert Numbers(tmp_path).builds == 2
    for files in ({"a": "1", "b": "2"}, {"b": "2", "a": "1"}):  # a row knows its file by its number
        monkeypatch.setattr(Numbers, "facts", lambda self, files=files: files)
        open_index(Numbers(tmp_path))
    assert "built anew: the order of its files has changed" in caplog.text


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    class Failing(Numbers):
        def build(self, writer, bar):
            super().build(writer, bar)
            raise ValueError("no picture")

    with pytest.raises(ValueError, match="no picture"):
        open_index(Failing(tmp_path))
    left = {file.suffix for file in (tmp_path / HIDDEN).iterdir()}
    assert left == {".lock", ""}  # "" is .gitignore
    assert len(open_index(Numbers(tmp_path))) == 5


def test_a_killed_build_leaves_nothing_that_is_read(tmp_path):
    recipe = Numbers(tmp_path, 100_000, seconds=600)
    process = multiprocessing.get_context("fork").Process(target=open_index, args=(recipe,))
    process.start()
    deadline = time.monotonic() + 60
    unfinished = f"{HIDDEN}/.*.partial"
    while not any(file.stat().st_size > 2**20 for file in tmp_path.glob(unfinished)):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert list(tmp_path.glob(unfinished))
    assert not list(tmp_path.glob(f"{HIDDEN}/*.arrow"))
    assert list(open_index(Numbers(tmp_path, 9))) == rows(9)
    assert not list(tmp_path.glob(unfinished))


def test_processes_that_open_at_once_build_once(tmp_path):
    recipe = Numbers(tmp_path, 5, seconds=1.0)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert [len(index) for index in pool.map(open_index, [recipe] * 4, chunksize=1)] == [5] * 4
    assert recipe.builds == 1


def test_where_the_file_system_knows_no_locks_that_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(indexed, "try_lock", lambda *_, **__: None)
    assert len(open_index(Numbers(tmp_path))) == 5
    assert "has no locks" in caplog.text


def test_pickles_and_refuses_another_index(tmp_path):
    index = open_index(Numbers(tmp_path, 5))
    pickled = pickle.dumps(index)
    assert len(pickled) < 500
    assert list(pickle.loads(pickled)) == list(index)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(index.__getitem__, range(5)) == rows(5)
    open_index(Numbers(tmp_path, 6))
    assert list(index) == rows(5)  # what is open stays what it is
    with pytest.raises(RuntimeError, match="built anew"):
        pickle.loads(pickled)


def test_a_folder_that_is_named_keeps_the_indexes_of_many_data_sets(tmp_path):
    places, kept = [tmp_path / name for name in ("a", "b")], tmp_path / "kept" / "here"
    for count, place in enumerate(places, 3):
        place.mkdir()
        assert len(open_index(Numbers(place, count), kept)) == count
        assert not (place / HIDDEN).exists()
    assert len(list(kept.glob("*.arrow"))) == 2
    assert [len(open_index(Numbers(p), kept)) for p in places] == [5, 5]


def test_data_that_cannot_be_written_to_are_indexed_in_the_cache(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / HIDDEN).write_text("a file where the folder would be: even root cannot write there")
    for _ in range(2):
        assert len(open_index(Numbers(data))) == 5
    kept = tmp_path / "home" / ".cache" / "torchtitan_flux" / "index"
    assert [file.suffix for file in sorted(kept.iterdir())] == [".arrow", ".lock"]
    assert Numbers(data).builds == 1


def test_an_index_that_came_with_read_only_or_moved_data_is_used(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    open_index(Numbers(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.setattr(indexed, "locked", lambda *_: 1 / 0)
    assert len(open_index(Numbers(tmp_path / "b"))) == 5


def measured(count: int, folder: Path) -> dict[str, float]:
    """Figures that benchmarks/index_rows.py prints, by what stands before the colon."""
    script = ROOT / "benchmarks" / "index_rows.py"
    done = subprocess.run(
        [sys.executable, script, "--rows", str(count), "--folder", folder],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (line.split(": ") for line in done.stdout.splitlines())
    return {name: float(re.findall(r"[\d.]+", figures)[0]) for name, figures in lines}


@pytest.mark.parametrize(
    ("count", "megabytes"), [(300_000, 16), pytest.param(10_000_000, 200, marks=pytest.mark.long)]
)
def test_rows_stay_on_disk(tmp_path, count, megabytes):
    """300,000 rows are a file of 40 MB."""
    figures = measured(count, tmp_path)
    assert figures["opened"] == count
    assert figures["RssAnon grown after opening"] < megabytes
    assert figures["RssAnon grown after reading"] < megabytes
