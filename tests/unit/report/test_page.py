"""The page of a run says what the run left, and nothing else."""

import base64
import json
import math
import os
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from torchtitan_flux.checkpoint.manifest import FileFacts, Manifest, RunFacts
from torchtitan_flux.files import try_lock
from torchtitan_flux.image_file import save_picture
from torchtitan_flux.report.__main__ import main
from torchtitan_flux.report.page import OTHERS, figures, page, tiles
from torchtitan_flux.report.run import Run, Start, joined, read_grid, read_run, spread
from torchtitan_flux.training.environment import append_environment, environment

NOW = 1_770_010_000.0
HOSTILE = "</script><script>alert(1)</script> \" onerror='x' <b>&amp;"
TIMES = (0.0625, 0.4375, 0.9375)
LOSS, VALIDATION = "loss_metrics/global_avg_loss", "validation_metrics/loss"
CONFIG = """
job = {description = "three & four", dump_folder = "somewhere"}
model.flavor = "flux-tiny"
training = {dataset = "shapes", img_size = 16, steps = 30}
sampling.prompts = ["a | b", "c"]
gone.key = 3
"""
Values = list[tuple[str, int, float]]


def write_events(folder: Path, begin: float, values: Values) -> None:
    """An event file in which each value (tag, step, value) comes a second after the last."""
    writer = EventFileWriter(str(folder))
    for i, (tag, step, value) in enumerate(values):
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(wall_time=begin + i, step=step, summary=summary))
    writer.close()


def logged(step: int, generation: int) -> Values:
    """All that is logged at a step; no two values of a run are equal."""
    base = 1 + 1 / step + generation / 128
    tags = [LOSS, *OTHERS]
    values = [(tag, step, base * (2 + i)) for i, tag in enumerate(tags) if tag != "mfu(%)"]
    if step == 9:
        values = [(tag, step, math.nan if tag == "grad_norm" else v) for tag, _, v in values]
    if step % 6 == 0:
        values.append((VALIDATION, step, base * 0.9))
        values += [(f"{VALIDATION}_t={t:.4f}", step, base * (2 - t)) for t in TIMES]
    return values


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict[str, dict[int, float]]]:
    """A folder, and every scalar in it: killed after step 21, continued from 12, stopped at 24."""
    folder = tmp_path_factory.mktemp("runs") / "my <run>"
    first = [value for step in range(3, 22, 3) for value in logged(step, 0)]
    second = [value for step in range(15, 25, 3) for value in logged(step, 1)]
    write_events(folder / "tb" / "20260101-1000", 1_770_000_000, first)
    write_events(folder / "tb" / "20260101-1100", 1_770_003_600, second)
    expected: dict[str, dict[int, float]] = {}
    # validation was measured at 6, 12 and 18 and then at 18 and 24: the later 18 counts
    for tag, step, value in first + second:
        expected.setdefault(tag, {})[step] = torch.tensor(value, dtype=torch.float32).item()
    (folder / "config.toml").write_text(CONFIG)
    for step, prompt, size in ((9, "a | b", (12, 8)), (18, HOSTILE, (1200, 1600))):
        facts = {"prompts": json.dumps([prompt, "c"]), "step": "9", "cfg": "2.0"}
        save_picture(Image.new("RGB", size, "red"), folder / f"samples/step-{step}.png", facts)
    checkpoint = folder / "checkpoint" / "step-12"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"x" * 3072)
    facts = RunFacts(seed=77, global_batch_size=40, context_in_dim=5, vec_in_dim=6, in_channels=7)
    Manifest(12, "full", facts, 1_770_000_500.0, {"weights": FileFacts(3072, "")}).write(checkpoint)
    (folder / "checkpoint" / "step-21").mkdir()
    bad = {"item": f"x/{HOSTILE}.png", "reason": "cut short", "used_for": "training", "position": 8}
    (folder / "quarantine.jsonl").write_text(json.dumps(bad) + '\n{"item": "half')
    degrees = {"dp_shard": 3, "tp": 2, "pp": 1}
    append_environment(folder, environment(6, degrees, torch.device("cpu")))
    return folder, expected


@pytest.fixture(scope="module")
def run(written) -> Run:
    return read_run(written[0])


@pytest.fixture
def copy(written, tmp_path) -> Path:
    return Path(shutil.copytree(written[0], tmp_path / "run"))


class Page(HTMLParser):
    """Tags with their attributes, scripts, and everything else as text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        self.scripts += [""] if tag == "script" else []

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


@pytest.fixture(scope="module")
def read(run) -> Page:
    return Page(page(run, NOW))


def test_every_scalar_is_read_and_a_later_start_counts_from_its_first_step(written, run):
    assert run.scalars.keys() == written[1].keys()
    for tag, series in written[1].items():
        assert run.scalars[tag] == pytest.approx(series, nan_ok=True), tag
    assert len(run.starts) == 2
    first = Start(0.0, 9.0, {"loss": {10: 1.0, 20: 2.0, 40: 4.0}, "score/x": {40: 99.0}})
    back = Start(20.0, 29.0, {"loss": {20: 2.5, 30: 3.5}})
    assert joined([first, back]) == {"loss": {10: 1.0, 20: 2.5, 30: 3.5}}
    again = Start(30.0, 31.0, {"score/x": {30: 97.0}})  # a finished run: scored anew
    assert joined([first, back, again])["loss"][30] == 3.5


def test_files_of_one_folder_and_of_rank_0(tmp_path):
    for rank, value in (("rank_0", 1.0), ("rank_1", 5.0), ("rank_10", 6.0)):
        write_events(tmp_path / "tb" / "now" / rank, 0.0, [(LOSS, 1, value), (LOSS, 2, value)])
    write_events(tmp_path / "tb" / "now" / "rank_0", 50.0, [(LOSS, 2, 3.0)])
    run = read_run(tmp_path)
    assert run.scalars == {LOSS: {1: 1.0, 2: 3.0}}
    assert len(run.starts) == 2


def test_curves_hold_every_value_logged(written, run):
    scalars = written[1]
    average = {"validation_metrics/ema_0.99/loss": {6: 0.5}, f"{VALIDATION}_t=x": {6: 1.0}}
    found = figures(replace(run, scalars=run.scalars | average))
    assert {"loss", "by-time"} <= set(found)
    assert len(found) == 2 + len(OTHERS) - 1
    curves = {line.name: dict(zip(line.x, line.y, strict=True)) for line in found["loss"].data}
    assert curves == {
        "training": pytest.approx(scalars[LOSS]),
        "validation": pytest.approx(scalars[VALIDATION]),
        "validation, ema_0.99": {6: 0.5},
    }
    by_time = [scalars[f"{VALIDATION}_t={t:.4f}"] for t in TIMES]
    for line, series in zip(found["by-time"].data, by_time, strict=True):
        assert dict(zip(line.x, line.y, strict=True)) == pytest.approx(series)


def test_the_headline(written, run, read):
    assert (run.state, run.step) == ("stopped", 24)
    scored = replace(run, scalars=run.scalars | {"score/read_as_prompted(%)": {30: 97.5}})
    found = {name: (value, note) for name, value, note in tiles(scored)}
    assert found["Step"] == ("24", "of 30")
    assert found["Training loss"] == (f"{written[1][LOSS][24]:.4g}", "at step 24")
    assert found["Time"][1] == "in 2 start(s)"
    assert found["Score"] == ("97.5", "read as prompted(%)")


def test_configuration_environment_checkpoints_and_quarantine(read):
    text = read.text.replace("\n", "")
    for part in (
        "three & four · flux-tiny · shapes",
        "sampling.prompts['a | b', 'c'][]",
        "gone.key3no such key",
        "ranks6",
        "dp_shard 3 tp 2",
        "Seed77",
        "12complete3.0 KiB2026-02-02 02:48 UTC",
        "21not complete, never loaded",
        "1 unreadable item",
        "cut short",
        "not finite in 1 of the logged steps: 9",
    ):
        assert part in text


def test_nothing_is_fetched_and_foreign_text_stays_text(run, read):
    for tag, values in read.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert (values.get(name) or "data:").startswith("data:"), (tag, values)
        assert not any(name.startswith("on") for name in values)
    assert len(read.scripts) == 2
    assert "alert(1)" not in "".join(read.scripts)
    assert read.text.count(HOSTILE) == 2  # below the picture, and in the quarantine
    hostile = replace(run, scalars={f"validation_metrics/ema{HOSTILE}/loss": {1: 1.0}})
    assert len(Page(page(hostile, NOW)).scripts) == 2
    assert any("default-src 'none'" in (v.get("content") or "") for _, v in read.tags)


def test_pictures_are_those_of_the_run_large_ones_reduced_many_spread(written, run, tmp_path):
    for grid in run.grids:
        content = (written[0] / "samples" / f"step-{grid.step}.png").read_bytes()
        assert base64.b64decode(grid.data.partition(",")[2]) == content
    assert [grid.prompts for grid in run.grids] == [["a | b", "c"], [HOSTILE, "c"]]
    path = tmp_path / "step-5.png"
    Image.frombytes("RGB", (2000, 250), os.urandom(2000 * 250 * 3)).save(path)
    grid = read_grid(5, path)
    assert grid.data.startswith("data:image/jpeg")
    assert grid.prompts == []
    assert spread(list(range(1000)), 5) == [0, 250, 500, 749, 999]


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("config.toml", "No configuration"),
        ("tb", "No TensorBoard values"),
        ("samples", "No grids of pictures"),
        ("environment.jsonl", "No environment.jsonl"),
    ],
)
def test_what_is_missing_is_noted(copy, read, name, note):
    path = copy / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert note in Page(page(read_run(copy), NOW)).text
    assert note not in read.text


def test_damaged_parts_are_noted_or_passed_over(copy):
    (copy / "samples" / "step-9.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (copy / "checkpoint" / "step-12" / "manifest.json").write_text("{")
    (copy / "environment.jsonl").write_text('{"ranks": 2}\n{"host"')
    (copy / "tb" / "events.out.tfevents.9").write_bytes(b"\xff" * 100)
    (copy / "config.toml").write_text("[job\n")
    run = read_run(copy)
    assert "step-9.png cannot be read as a picture" in Page(page(run, NOW)).text
    assert run.environments == [{"ranks": 2}]
    assert run.incomplete == [21, 12]
    assert not run.config
    assert run.scalars


def test_states(copy):
    config = copy / "config.toml"
    config.write_text(config.read_text().replace("steps = 30", "steps = 24"))
    assert read_run(copy).state == "finished"
    with (copy / "run.lock").open("w") as file:
        assert read_run(copy).state == "finished"
        try_lock(file.fileno())
        assert read_run(copy).state == "running"
    config.unlink()
    assert read_run(copy).state == "unknown"


def test_the_command_writes_one_file_or_says_why_not(written, tmp_path, capsys, monkeypatch):
    out = tmp_path / "new" / "page.html"
    main([str(written[0]), "--out", str(out)])
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    assert str(out) in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([str(written[0]), "--out", str(out / "below.html")])
    assert re.fullmatch(r".*page\.html.*\n", capsys.readouterr().err)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    monkeypatch.delitem(sys.modules, "torchtitan_flux.report.page")
    with pytest.raises(SystemExit, match="2"):
        main([str(written[0])])
    assert 'pip install "torchtitan-flux[report]"' in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_folder_that_is_no_run(tmp_path, capsys, name):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / name)])
    assert "give the job.dump_folder of a run" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.html*"))
