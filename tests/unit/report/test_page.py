"""The page of a run says what the run left, and nothing else."""

import fcntl
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
from PIL import Image, PngImagePlugin

from torchtitan_flux.report.charts import number
from torchtitan_flux.report.command import main
from torchtitan_flux.report.curves import SINGLE
from torchtitan_flux.report.grids import MAX_BYTES, MAX_SIDE, read_grid, spread
from torchtitan_flux.report.page import page
from torchtitan_flux.report.read import NotARun, Run, read_run
from torchtitan_flux.report.settings import UNKNOWN, find_configuration, read_settings
from torchtitan_flux.report.tables import QUARANTINE_ROWS
from torchtitan_flux.report.words import duration, size_text
from torchtitan_flux.training.environment import PACKAGES, read_json_lines

REPO = Path(__file__).resolve().parents[3]
NOW = 1_770_010_000.0
HOSTILE = "</script><script>alert(1)</script> \" onerror='x' <b>&amp;"
VOID = {"meta", "input", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """A page taken apart; every element has to be closed in its turn.

    Attributes:
        tables: cells by the id of the figure around them, or the heading before them.
        text: everything between tags, scripts and styles left out.
    """

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: list[str] = []
        self.text = ""
        self._name = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert len(values) == len(attrs), "an attribute twice"
        self.tags.append((tag, values))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "figure":
            self._name = values["id"] or ""
        elif tag in ("h2", "h3") and "figure" not in self.open:
            self._name = ""
        elif tag == "table":
            self.tables[self._name] = []
        elif tag == "tr":
            self.tables[self._name].append([])
        elif tag in ("td", "th"):
            self.tables[self._name][-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))  # in SVG

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.text += data
            if {"h2", "h3"} & set(self.open) and "figure" not in self.open:
                self._name += data
            if "td" in self.open or "tbody" in self.open or "thead" in self.open:
                self.tables[self._name][-1][-1] += data


@pytest.fixture(scope="module")
def run(written) -> Run:
    return read_run(written.folder)


@pytest.fixture(scope="module")
def html(run) -> str:
    return page(run, NOW)


@pytest.fixture(scope="module")
def read(html) -> Page:
    return Page(html)


# ---- numbers -------------------------------------------------------------------------------


def tags_of_charts() -> dict[str, list[str]]:
    """TensorBoard's tags of the columns of each chart."""
    charts = {
        "loss": [
            "loss_metrics/global_avg_loss",
            "loss_metrics/global_max_loss",
            "validation_metrics/loss",
        ],
        "by-time": [f"validation_metrics/loss_t={t}" for t in ("0.0625", "0.4375", "0.9375")],
    }
    for tag, *_ in SINGLE:
        if tag != "mfu(%)":
            charts[re.sub(r"\W|_", "-", tag).strip("-")] = [tag]
    return charts


def test_every_value_of_every_curve_is_the_one_logged(written, read):
    data = json.loads(read.scripts[0])
    charts = tags_of_charts()
    assert set(charts) | {"profile"} == set(data)
    for name, tags in charts.items():
        columns = [written.scalars[tag] for tag in tags]
        steps = sorted({step for column in columns for step in column})
        assert read.tables[name][1:] == [
            [str(step), *(number(c[step]) if step in c else "" for c in columns)] for step in steps
        ], name
        for line, column in zip(data[name]["lines"], columns, strict=True):
            assert line["x"] == sorted(column), name
            assert line["y"] == [number(column[step]) for step in sorted(column)], name


def test_the_profile_has_the_last_measurement_of_every_time(written, read):
    by_time = {
        t: written.scalars[f"validation_metrics/loss_t={t:.4f}"] for t in (0.0625, 0.4375, 0.9375)
    }
    assert read.tables["profile"][0] == ["t", "step 6", "step 12", "step 18", "step 24"]
    assert read.tables["profile"][1:] == [
        [f"{t}", *(number(values[step]) for step in (6, 12, 18, 24))]
        for t, values in by_time.items()
    ]


def test_the_headline(written, read, run):
    assert run.state == "stopped"
    assert "stopped at step 24" in read.text
    loss = written.scalars["loss_metrics/global_avg_loss"][24]
    validation = written.scalars["validation_metrics/loss"][24]
    rates = sorted(written.scalars["throughput/images_per_second"].values())
    median = (rates[3] + rates[4]) / 2
    assert len(rates) == 8
    for tile in (
        "Step24of 30",
        f"Training loss{number(loss)}at step 24",
        f"Validation loss{number(validation)}at step 24",
        f"Throughput{number(median)}images/s, median",
        "Time2 minfirst to last value, 2 starts",  # 82 and 48 values, a second each
        "three & four · flux-tiny · shapes, 16 × 16 px · 30 steps of 40 images",
        "not finite (×) in 1 of the steps that were logged: 9",
    ):
        assert tile in re.sub(r"\n", "", read.text), tile
    widths = [values["style"] for tag, values in read.tags if tag == "div" and "style" in values]
    assert widths == ["width:80.0%"]


def test_scores_stand_in_the_headline(written, tmp_path, run):
    from dataclasses import replace

    from torchtitan_flux.report.events import Series

    scored = replace(
        run, scalars={**run.scalars, "score/read_as_prompted(%)": Series((30,), (97.5,))}
    )
    assert "Score97.5read as prompted(%)" in Page(page(scored, NOW)).text


def test_the_configuration_says_what_differs_and_then_all(written, read):
    heading = "Configuration"
    rows = {row[0].split(" ")[0]: row for row in read.tables[heading][1:]}
    differing = {
        "job.description": ('"three & four"', '"FLUX pretraining"'),
        "job.dump_folder": ('"somewhere"', '"./outputs"'),
        "model.flavor": ('"flux-tiny"', '"flux-digits"'),
        "training.dataset": ('"shapes"', '"digits"'),
        "training.img_size": ("16", "256"),
        "training.steps": ("30", "10000"),
        "sampling.prompts": ('["a | b", "c"]', "[]"),
        "gone.key": ("3", "no such key today"),
    }
    found = {
        next(k for k in differing if text.startswith(k)): row[1:] for text, row in rows.items()
    }
    assert found == {key: list(values) for key, values in differing.items()}
    settings = read_settings(written.folder / "config.toml")
    assert f"All {len(settings)} keys as resolved" in read.text
    assert len(settings) > 190
    for setting in settings:
        section, _, name = setting.key.rpartition(".")
        assert [name, setting.value_text] in read.tables[f"[{section}]"], setting.key


def test_environment_and_checkpoints(written, read):
    (facts,) = read_json_lines(written.folder / "environment.jsonl")
    latest = dict(read.tables["Latest start"])
    assert latest["Ranks"] == "6 (dp_shard 3, tp 2)"
    assert latest["Host"] == facts["host"]
    assert latest["Device"].startswith("CPU (")
    assert latest["torch"] == facts["packages"]["torch"]
    assert {"torch", "torchtitan"} <= set(PACKAGES) & set(latest)
    tied = dict(read.tables["What the run is tied to"])
    assert tied["Seed"] == "77"
    assert tied["Global batch"] == "40 images"
    assert tied["Text context, pooled text"] == "5, 6 wide"
    assert tied["Latent channels"] == "7"
    assert read.tables["Checkpoints"][1:] == [
        ["12", "complete", "3 KiB", "2026-02-02 02:48 UTC"],
        ["21", "not complete, never loaded", "", ""],
    ]
    assert [row[1] for row in read.tables["Starts"][1:]] == ["1 min", "47 s"]


def test_quarantine(written, read):
    assert "1 unreadable item" in read.text
    assert read.tables["1 unreadable item"][1:] == [
        [f"x/{HOSTILE}.png", "cut short", "training", "8"]
    ]


def test_words_for_times_and_sizes():
    assert [duration(s) for s in (5.0, 59.4, 60.0, 3599.0, 3600.0, 90_000.0)] == [
        "5 s", "59 s", "1 min", "1 h 00 min", "1 h 00 min", "25 h 00 min",
    ]  # fmt: skip
    assert [size_text(b) for b in (5, 2048, 3 * 2**20, 5 * 2**39)] == [
        "5 B", "2 KiB", "3 MiB", "2.5 TiB",
    ]  # fmt: skip


# ---- a page that needs nothing and does no harm ------------------------------------------------


def test_the_page_is_well_formed_and_refers_to_nothing_outside(html, read):
    assert html.startswith("<!doctype html>")
    for tag, values in read.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
            assert (values.get(name) or "data:").startswith("data:"), (tag, values)
    for outside in ("http:", "https:", "//cdn", "@import", "url("):
        assert outside not in html
    ids = [values["id"] for _, values in read.tags if "id" in values]
    assert len(ids) == len(set(ids))
    pictures = [values for tag, values in read.tags if tag == "img"]
    assert all("alt" in values for values in pictures)
    assert all(values["aria-label"] for tag, values in read.tags if tag == "svg")


def test_what_others_wrote_stays_text(html, read):
    assert len(read.scripts) == 2
    assert "alert" not in "".join(read.scripts)
    assert not [1 for _, values in read.tags if any(name.startswith("on") for name in values)]
    assert "b" not in {tag for tag, values in read.tags if values.get("title")}
    shown = [values["title"] for tag, values in read.tags if tag == "li" and "title" in values]
    assert shown == ["a | b", "c", HOSTILE, "c"]
    assert read.text.count(HOSTILE) == 2  # below the picture, and in the quarantine
    assert "my <run>" in read.text
    assert "<run>" not in html


def test_pictures_are_those_of_the_run(written, read):
    import base64

    sources = [values["src"] for tag, values in read.tags if tag == "img" and "src" in values]
    files = [written.folder / "samples" / f"step-{step}.png" for step in (9, 18)]
    assert [base64.b64decode(str(source).partition(",")[2]) for source in sources] == [
        path.read_bytes() for path in files
    ]
    assert [values["data-step"] for _, values in read.tags if "data-step" in values] == ["9", "18"]


@pytest.mark.parametrize("text", [None, "a, b", '"a"', "7"])
def test_a_grid_of_another_program_has_no_prompts(tmp_path, text):
    metadata = PngImagePlugin.PngInfo()
    if text is not None:
        metadata.add_text("prompts", text)
    Image.new("RGB", (4, 4)).save(tmp_path / "step-5.png", pnginfo=metadata)
    assert read_grid(5, tmp_path / "step-5.png").prompts == ()


def test_large_grids_are_reduced(tmp_path):
    import base64
    import io
    import os

    size = (2000, 250)
    path = tmp_path / "step-5.png"
    Image.frombytes("RGB", size, os.urandom(size[0] * size[1] * 3)).save(path)
    grid = read_grid(5, path)
    assert grid.reduced
    assert (grid.width, grid.height) == size
    assert grid.prompts == ()
    content = base64.b64decode(grid.data.partition(",")[2])
    assert path.stat().st_size > MAX_BYTES
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (MAX_SIDE, MAX_SIDE // 8)


def test_many_grids_are_spread_over_the_run():
    assert spread(list(range(1000)), 5) == [0, 250, 500, 749, 999]
    assert spread([1, 2], 5) == [1, 2]


# ---- runs that left less -----------------------------------------------------------------------


def copy(written, tmp_path: Path, *without: str) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(written.folder, folder)
    for name in without:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.toml", "No configuration as resolved"),
        ("tb", "No TensorBoard values yet"),
        ("samples", "No grids of pictures"),
        ("environment.jsonl", "No environment.jsonl: versions, devices and number of ranks"),
        ("checkpoint", None),
        ("quarantine.jsonl", None),
    ],
)
def test_what_is_missing_is_said(written, read, tmp_path, name, said):
    text = Page(page(read_run(copy(written, tmp_path, name)), NOW)).text
    if said:
        assert said in text
        assert said not in read.text


@pytest.mark.parametrize("only", ["config.toml", "tb", "samples", "checkpoint"])
def test_one_part_alone_makes_a_page(written, tmp_path, only):
    folder = tmp_path / "run"
    folder.mkdir()
    source = written.folder / only
    (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / only)
    run = read_run(folder)
    Page(page(run, NOW))
    assert run.step == {"config.toml": 0, "tb": 24, "samples": 18, "checkpoint": 12}[only]
    assert run.state == ("stopped" if only == "config.toml" else "not known")


def test_damaged_parts_are_said_or_passed_over(written, tmp_path):
    folder = copy(written, tmp_path)
    (folder / "samples" / "step-9.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (folder / "checkpoint" / "step-12" / "manifest.json").write_text("{")
    (folder / "environment.jsonl").write_text('{"ranks": 2}\n{"host"')
    (folder / "tb" / "events.out.tfevents.9").write_bytes(b"\xff" * 100)
    (folder / "config.toml").write_text("[job\n")
    run = read_run(folder)
    read = Page(page(run, NOW))
    assert "step-9.png cannot be read as a picture" in read.text
    assert read.tables["Latest start"] == [["Ranks", "2"]]
    assert run.incomplete == [21, 12]
    assert not run.settings
    assert len(run.grids) == 1


def test_a_long_quarantine_is_cut(written, tmp_path):
    folder = copy(written, tmp_path)
    lines = [json.dumps({"item": f"i{n}", "reason": "r"}) for n in range(QUARANTINE_ROWS + 5)]
    (folder / "quarantine.jsonl").write_text("\n".join(lines))
    text = Page(page(read_run(folder), NOW)).text
    assert "205 unreadable items" in text
    assert "and 5 more in quarantine.jsonl" in text


def test_states(written, tmp_path):
    folder = copy(written, tmp_path)
    (folder / "config.toml").write_text("[job]\n[training]\nsteps = 24\n")
    assert read_run(folder).state == "finished"
    lock = folder / "run.lock"
    with lock.open("w") as file:
        assert read_run(folder).state == "finished"
        fcntl.flock(file, fcntl.LOCK_EX)
        assert read_run(folder).state == "running"
    assert read_run(folder).state == "finished"


def test_configurations_under_another_name_and_as_json(tmp_path):
    assert find_configuration(tmp_path) is None
    (tmp_path / "a.json").write_text("[1]")
    (tmp_path / "b.json").write_text('{"other": 1}')
    (tmp_path / "run.json").write_text('{"job": {}, "training": {"steps": 7, "seed": null}}')
    path = find_configuration(tmp_path)
    assert path == tmp_path / "run.json"
    by_key = {one.key: one for one in read_settings(path)}
    assert by_key["training.steps"].value == 7
    assert by_key["training.seed"].default is UNKNOWN
    assert not by_key["training.img_size"].differs
    assert by_key["lr_scheduler.total_steps"].value_text == "unset"


# ---- command line ------------------------------------------------------------------------------


def test_the_command_writes_one_file(written, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    main([str(written.folder), "--out", str(out)])
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    assert Page(out.read_text()).text.count("my <run>") >= 2
    assert str(out) in capsys.readouterr().out


def test_the_folder_one_stands_in_has_a_name(written, monkeypatch):
    monkeypatch.chdir(written.folder)
    assert Page(page(read_run(Path(".")), NOW)).text.count("my <run>") >= 2


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_a_folder_that_is_no_run(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    folder = tmp_path / name
    with pytest.raises(NotARun):
        read_run(folder)
    with pytest.raises(SystemExit) as status:
        main([str(folder)])
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(folder) in error
    assert "give the job.dump_folder of a run" in error
    assert not list(tmp_path.rglob("*.html*"))


def test_a_page_that_cannot_be_written(written, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit) as status:
        main([str(written.folder), "--out", str(tmp_path / "file" / "page.html")])
    assert status.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_script_as_it_is_typed(written, tmp_path):
    command = [sys.executable, "scripts/report.py", str(written.folder), "--out"]
    done = subprocess.run(
        [*command, str(tmp_path / "page.html")],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert Page((tmp_path / "page.html").read_text()).text.count("my <run>") >= 2
