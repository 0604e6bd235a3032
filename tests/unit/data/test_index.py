"""The index file, and the agreement of processes on who builds it."""

import json
import logging
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from torchtitan_flux.data.sources import index as index_module
from torchtitan_flux.data.sources.index import DamagedIndex, Index, IndexWriter, Row
from torchtitan_flux.data.sources.index_cache import HIDDEN, index_file, open_index

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _home_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def a_row(number: int) -> Row:
    captions = tuple(f"ünï {number} {k}" for k in range(number % 4))
    return Row(f"d/{number}.jpg", number % 3, number * 10**10, number, 7, 11, captions, "")


def write_rows(path: Path, rows: int) -> None:
    with IndexWriter(path, {"made": "of numbers"}) as writer:
        for number in range(rows):
            writer.add(a_row(number))


class Numbers:
    """A recipe of `rows` rows that notes each time it is carried out."""

    name = "numbers"
    title = "some numbers"
    left_out: dict[str, list[str]] = {}  # noqa: RUF012
    identity = ""

    def __init__(self, place: Path, rows: int = 5, seconds: float = 0.0):
        self.place, self.rows, self.seconds = place, rows, seconds

    def facts(self, stored):
        return {"its number of rows": str(self.rows)}

    def build(self, writer, bar):
        with (self.place / "builds").open("a") as file:
            file.write(f"{os.getpid()}\n")
        for number in range(self.rows):
            writer.add(a_row(number))
            bar.update()
        time.sleep(self.seconds)

    @property
    def builds(self) -> int:
        return len((self.place / "builds").read_text().split())


@pytest.mark.parametrize("rows", [0, 1, 13, 14, 131])
def test_rows_come_back_one_by_one_over_batch_borders(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(index_module, "BATCH_ROWS", 13)
    write_rows(tmp_path / "x.arrow", rows)
    index = Index(tmp_path / "x.arrow")
    assert len(index) == rows
    assert index.facts == {"made": "of numbers"}
    backwards = reversed(range(rows))
    assert [index[i] for i in backwards] == [a_row(i) for i in reversed(range(rows))]
    for beyond in (-1, rows):
        with pytest.raises(IndexError):
            index[beyond]


def test_captions_that_utf8_cannot_encode_are_stored_all_the_same(tmp_path):
    with IndexWriter(tmp_path / "x.arrow", {}) as writer:
        writer.add(a_row(0)._replace(captions=("half \ud800 a pair",)))
    assert Index(tmp_path / "x.arrow")[0].captions == ("half ? a pair",)


def test_long_captions_are_written_before_the_batch_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "BATCH_CHARACTERS", 100)
    write_rows(tmp_path / "x.arrow", 50)
    assert len(Index(tmp_path / "x.arrow")._batches) > 3
    assert list(Index(tmp_path / "x.arrow")) == [a_row(i) for i in range(50)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"garbage" * 100,
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data.replace(b'"format": "4"', b'"format": "0"'),
        lambda data: data.replace(b"torchtitan_flux.index", b"torchtitan_flux.other"),
    ],
)
def test_a_damaged_file_is_told_and_built_anew(tmp_path, caplog, damage):
    recipe = Numbers(tmp_path)
    open_index(recipe)
    file = index_file(recipe, tmp_path / HIDDEN)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DamagedIndex):
        Index(file)
    with caplog.at_level(logging.INFO):
        assert len(open_index(recipe)) == 5
    assert "some numbers is built anew: it is damaged" in caplog.text
    assert recipe.builds == 2


def test_is_built_once_and_again_when_its_facts_have_changed(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert len(open_index(Numbers(tmp_path, 5))) == 5
        assert re.search(r"Indexed some numbers: 5 items in .* s, kept in ", caplog.text)
        caplog.clear()
        assert len(open_index(Numbers(tmp_path, 5))) == 5
        assert caplog.text == ""
        assert len(open_index(Numbers(tmp_path, 6))) == 6
    assert "built anew: its number of rows has changed" in caplog.text
    assert Numbers(tmp_path).builds == 2


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
    context = multiprocessing.get_context("fork")
    recipe = Numbers(tmp_path, 100_000, seconds=600)
    process = context.Process(target=open_index, args=(recipe,), daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size > 2**20 for file in tmp_path.glob(f"{HIDDEN}/.*.partial")):
        if not process.is_alive() or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    assert process.is_alive()
    process.kill()
    process.join()
    assert list(tmp_path.glob(f"{HIDDEN}/.*.partial"))
    assert not list(tmp_path.glob(f"{HIDDEN}/*.arrow"))
    assert list(open_index(Numbers(tmp_path, 9))) == [a_row(i) for i in range(9)]


def _open_and_send(place: Path, connection) -> None:
    index = open_index(Numbers(place, 5, seconds=1.0))
    connection.send([index[i].item_id for i in range(len(index))])


def test_processes_that_open_at_once_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(4)]
    processes = [
        context.Process(target=_open_and_send, args=(tmp_path, sender), daemon=True)
        for _, sender in pipes
    ]
    for process in processes:
        process.start()
    read = [receiver.recv() if receiver.poll(15) else None for receiver, _ in pipes]
    for process in processes:
        process.join(15)
    assert read == [[a_row(i).item_id for i in range(5)]] * 4
    assert Numbers(tmp_path).builds == 1


def test_pickles_and_refuses_another_index(tmp_path):
    index = open_index(Numbers(tmp_path, 5))
    pickled = pickle.dumps(index)
    assert len(pickled) < 500
    assert list(pickle.loads(pickled)) == list(index)
    open_index(Numbers(tmp_path, 6))
    assert len(index) == 5  # what is open stays what it is
    assert index[4] == a_row(4)
    with pytest.raises(RuntimeError, match="built anew"):
        pickle.loads(pickled)


def test_is_read_after_fork(tmp_path):
    index = open_index(Numbers(tmp_path, 5))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(index.__getitem__, range(5)) == [a_row(i) for i in range(5)]


def test_a_folder_that_is_named_keeps_the_indexes_of_many_data_sets(tmp_path):
    places = [tmp_path / name for name in ("a", "b")]
    for rows, place in enumerate(places, 3):
        place.mkdir()
        assert len(open_index(Numbers(place, rows), tmp_path / "kept" / "here")) == rows
        assert not (place / HIDDEN).exists()
    assert len(list((tmp_path / "kept" / "here").glob("*.arrow"))) == 2
    assert [len(open_index(Numbers(p), tmp_path / "kept" / "here")) for p in places] == [5, 5]


def test_an_index_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.index_folder: the index of some numbers .*file"):
        open_index(Numbers(tmp_path), tmp_path / "file" / "index")


def test_data_that_cannot_be_written_to_are_indexed_in_the_cache(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / HIDDEN).write_text("a file where the folder would be: even root cannot write there")
    assert len(open_index(Numbers(data))) == 5
    kept = tmp_path / "home" / ".cache" / "torchtitan_flux" / "index"
    assert [file.suffix for file in sorted(kept.iterdir())] == [".arrow", ".lock"]
    open_index(Numbers(data))
    assert Numbers(data).builds == 1


def _open_unprivileged(data: Path, home: Path, connection) -> None:
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    os.environ["HOME"] = str(home)
    connection.send(len(open_index(Folderless(data))))


class Folderless(Numbers):
    """Numbers that write nothing beside the data."""

    def build(self, writer, bar):
        writer.add(a_row(0))


def test_permissions_decide_where_the_index_goes():
    """As tmp_path is, but readable by those who are not root."""
    with tempfile.TemporaryDirectory() as temporary:
        data, home = Path(temporary) / "data", Path(temporary) / "home"
        for folder, mode in ((data, 0o555), (home, 0o777), (Path(temporary), 0o755)):
            folder.mkdir(exist_ok=True)
            folder.chmod(mode)
        receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(
            target=_open_unprivileged, args=(data, home, sender)
        )
        process.start()
        assert receiver.poll(30)
        assert receiver.recv() == 1
        process.join()
        assert not list(data.iterdir())
        assert list(home.glob(".cache/torchtitan_flux/index/*.arrow"))


def test_an_index_that_came_with_read_only_data_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/nowhere")
    open_index(Numbers(tmp_path))
    monkeypatch.setattr("torchtitan_flux.data.sources.index_cache.locked", lambda *_: 1 / 0)
    assert len(open_index(Numbers(tmp_path))) == 5


def test_data_are_moved_with_their_index(tmp_path):
    (tmp_path / "a").mkdir()
    open_index(Numbers(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    open_index(Numbers(tmp_path / "b"))
    assert Numbers(tmp_path / "b").builds == 1


def measured(rows: int, folder: Path) -> dict[str, float]:
    """Figures that benchmarks/index_rows.py prints, by what stands before the colon."""
    script = ROOT / "benchmarks" / "index_rows.py"
    done = subprocess.run(
        [sys.executable, script, "--rows", str(rows), "--folder", folder],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (line.split(": ") for line in done.stdout.splitlines())
    return {name: float(re.findall(r"[\d.]+", figures)[0]) for name, figures in lines}


def test_rows_stay_on_disk(tmp_path):
    """300,000 rows are a file of 40 MB."""
    figures = measured(300_000, tmp_path)
    assert figures["opened"] == 300_000
    assert figures["RssAnon grown after reading"] < 16


@pytest.mark.long
def test_ten_million_rows_stay_on_disk(tmp_path):
    figures = measured(10_000_000, tmp_path)
    assert figures["opened"] == 10_000_000
    assert figures["RssAnon grown after opening"] < 200
    assert figures["RssAnon grown after reading"] < 200


def test_facts_survive_what_json_escapes(tmp_path):
    with IndexWriter(tmp_path / "x.arrow", {"ü": json.dumps(["\udcff", '"'])}):
        pass
    assert Index(tmp_path / "x.arrow").facts == {"ü": json.dumps(["\udcff", '"'])}
