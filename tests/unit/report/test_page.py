"""The page of a run says what the run left, and nothing else."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
from PIL import Image

from torchtitan_flux.files import try_lock
from torchtitan_flux.report.__main__ import main
from torchtitan_flux.report.page import OTHERS, POINTS, figures, page, thinned, tiles
from torchtitan_flux.report.run import (
    MAX_GRID_SIDE,
    NotARun,
    Run,
    Start,
    joined,
    read_grid,
    read_run,
    spread,
)

NOW = 1_770_010_000.0
HOSTILE = "</script><script>alert(1)</script> \" onerror='x' <b>&amp;"
CHROMIUM = shutil.which("chromium")


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
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


@pytest.fixture(scope="module")
def run(written) -> Run:
    return read_run(written.folder)


@pytest.fixture(scope="module")
def read(run) -> Page:
    return Page(page(run, NOW))


def test_every_scalar_is_read_and_a_later_start_counts_from_its_first_step(written, run):
    assert run.scalars.keys() == written.scalars.keys()
    for tag, series in written.scalars.items():
        assert run.scalars[tag] == pytest.approx(series, nan_ok=True), tag
    assert len(run.starts) == 2


def test_starts_that_overlap():
    first = Start(0.0, 9.0, {"loss": {10: 1.0, 20: 2.0, 40: 4.0}, "score/x": {40: 99.0}})
    back = Start(20.0, 29.0, {"loss": {20: 2.5, 30: 3.5}})
    assert joined([first, back]) == {"loss": {10: 1.0, 20: 2.5, 30: 3.5}}
    again = Start(30.0, 31.0, {"score/x": {30: 97.0}})  # a finished run: scored anew
    assert joined([first, back, again])["loss"][30] == 3.5


def test_files_of_one_folder_and_of_rank_0(event_writer, tmp_path):
    tag = "loss_metrics/global_avg_loss"
    for rank, value in (("rank_0", 1.0), ("rank_1", 5.0), ("rank_10", 6.0)):
        event_writer(tmp_path / "tb" / "now" / rank, 0.0, [(tag, 1, value), (tag, 2, value)])
    event_writer(tmp_path / "tb" / "now" / "rank_0", 50.0, [(tag, 2, 3.0)])
    run = read_run(tmp_path)
    assert run.scalars == {tag: {1: 1.0, 2: 3.0}}
    assert len(run.starts) == 2


def test_pictures_that_a_later_start_took_back_are_left_out(copy):
    import os

    for step in (9, 18):  # drawn between the first start and the second one, from 15 on
        os.utime(copy / "samples" / f"step-{step}.png", (1_770_001_000,) * 2)
    assert [grid.step for grid in read_run(copy).grids] == [9]


def test_long_curves_keep_their_spikes():
    series = {step: step / 1e5 for step in range(30_000)} | {777: 50.0, 12_345: -50.0}
    points = thinned(series)
    assert len(points) <= POINTS
    assert {(777, 50.0), (12_345, -50.0)} <= set(points)
    assert thinned({2: 1.0, 1: 0.0}) == [(1, 0.0), (2, 1.0)]


def test_curves_hold_every_value_logged(written, run):
    found = figures(run)
    assert {"loss", "by-time", "profile"} <= set(found)
    assert len(found) == 3 + len([tag for tag in OTHERS if tag in written.scalars])
    for tag, name in (
        ("loss_metrics/global_avg_loss", "training"),
        ("loss_metrics/global_max_loss", "training, highest of a rank"),
        ("validation_metrics/loss", "validation"),
    ):
        curve = next(line for line in found["loss"].data if line.name == name)
        assert dict(zip(curve.x, curve.y, strict=True)) == pytest.approx(written.scalars[tag])
    times = [0.0625, 0.4375, 0.9375]
    last = found["profile"].data[-1]
    assert list(last.x) == times
    assert list(last.y) == pytest.approx(
        [written.scalars[f"validation_metrics/loss_t={t:.4f}"][24] for t in times]
    )


def test_averages_are_drawn_beside_the_loss(run):
    more = {"validation_metrics/ema_0.99/loss": {6: 0.5}, "validation_metrics/loss_t=x": {6: 1.0}}
    names = [line.name for line in figures(replace(run, scalars=run.scalars | more))["loss"].data]
    assert names[-1] == "validation, ema_0.99"


def test_the_headline(written, run, read):
    assert run.state == "stopped"
    assert run.step == 24
    found = {name: (value, note) for name, value, note in tiles(run)}
    loss = written.scalars["loss_metrics/global_avg_loss"][24]
    assert found["Step"] == ("24", "of 30")
    assert found["Training loss"] == (f"{loss:.4g}", "at step 24")
    assert found["Time"][1] == "in 2 start(s)"
    scored = replace(run, scalars=run.scalars | {"score/read_as_prompted(%)": {30: 97.5}})
    assert ("Score", "97.5", "read as prompted(%)") in tiles(scored)
    assert "not finite in 1 of the logged steps: 9" in read.text


@pytest.mark.parametrize(
    "said",
    [
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
    ],
)
def test_configuration_environment_checkpoints_and_quarantine(read, said):
    assert said in re.sub(r"\n", "", read.text)


def test_nothing_is_fetched_and_what_others_wrote_stays_text(run, read):
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


def test_pictures_are_those_of_the_run(written, run):
    import base64

    for grid in run.grids:
        content = (written.folder / "samples" / f"step-{grid.step}.png").read_bytes()
        assert base64.b64decode(grid.data.partition(",")[2]) == content
    assert [grid.prompts for grid in run.grids] == [["a | b", "c"], [HOSTILE, "c"]]


def test_large_grids_are_reduced_and_many_are_spread(tmp_path):
    import os

    path = tmp_path / "step-5.png"
    Image.frombytes("RGB", (2000, 250), os.urandom(2000 * 250 * 3)).save(path)
    grid = read_grid(5, path)
    assert grid.data.startswith("data:image/jpeg")
    assert grid.prompts == []
    assert MAX_GRID_SIDE < 2000
    assert spread(list(range(1000)), 5) == [0, 250, 500, 749, 999]


@pytest.fixture
def copy(written, tmp_path) -> Path:
    return Path(shutil.copytree(written.folder, tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.toml", "No configuration"),
        ("tb", "No TensorBoard values"),
        ("samples", "No grids of pictures"),
        ("environment.jsonl", "No environment.jsonl"),
        ("checkpoint", ""),
        ("quarantine.jsonl", ""),
    ],
)
def test_what_is_missing_is_said(copy, read, name, said):
    path = copy / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = Page(page(read_run(copy), NOW)).text
    assert said in text
    assert not said or said not in read.text


def test_damaged_parts_are_said_or_passed_over(copy):
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


def test_states_and_a_configuration_as_json(copy):
    (copy / "config.toml").unlink()
    (copy / "run.json").write_text('{"job": {}, "training": {"steps": 24, "seed": null}}')
    (copy / "quarantine.jsonl").write_text('{"item": "x"}')
    assert read_run(copy).state == "finished"
    assert "of 24" in Page(page(read_run(copy), NOW)).text
    with (copy / "run.lock").open("w") as file:
        assert read_run(copy).state == "finished"
        try_lock(file.fileno())
        assert read_run(copy).state == "running"


def test_the_command_writes_one_file(written, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    main([str(written.folder), "--out", str(out)])
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_a_folder_that_is_no_run(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotARun):
        read_run(tmp_path / name)
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / name)])
    assert "give the job.dump_folder of a run" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.html*"))


def test_without_plotly_the_command_says_what_to_install(written, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    monkeypatch.delitem(sys.modules, "torchtitan_flux.report.page")
    with pytest.raises(SystemExit, match="2"):
        main([str(written.folder)])
    assert 'pip install "torchtitan-flux[report]"' in capsys.readouterr().err


def test_a_page_that_cannot_be_written(written, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit, match="2"):
        main([str(written.folder), "--out", str(tmp_path / "file" / "page.html")])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [400, 1400])
def test_it_fits_the_window_in_chromium(written, tmp_path, width):
    """Nothing is wider than the window, and every curve is drawn."""
    out, run = tmp_path / "page.html", read_run(written.folder)
    probe = "[document.documentElement.scrollWidth, document.querySelectorAll('.trace').length]"
    script = f"<script>setTimeout(() => {{ document.title = {probe} }}, 1500)</script></body>"
    out.write_text(page(run, NOW).replace("</body>", script))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    command = [str(CHROMIUM), *flags, "--virtual-time-budget=5000", "--dump-dom", out.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wide, traces = map(int, re.search(r"<title>(\d+),(\d+)", dom).groups())
    assert wide <= max(width, 500)  # headless windows are no narrower than 500
    assert traces == sum(len(figure.data) for figure in figures(run).values())
