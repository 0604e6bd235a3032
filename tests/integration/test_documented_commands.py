"""README.md, and the documents on data, drawing, running and the tasks of the guide, as they stand.

What is appended makes a command short.
"""

import io
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import hub_server
import pyarrow.parquet
import pytest
from documented_run import (
    GUIDED,
    SMALL,
    TINY,
    here,
    make_folder,
    shell,
    write_own_files,
)
from documents import DOCUMENTS, REPO, Command, claimed, commands
from PIL import Image
from programs import pixels

from torchtitan_flux import infer
from torchtitan_flux.launching.settings import Settings
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.startup.load_config import read_config

DIGITS = (
    "--training.steps", "2", "--training.local_batch_size", "8", "--validation.steps", "1",
    "--validation.local_batch_size", "8", "--sampling.images_per_prompt", "1",
    "--sampling.denoising_steps", "2", "--score.count", "10", "--score.denoising_steps", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="module")
def tiny_flavors() -> Iterator[None]:
    """Forked ranks inherit them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FLAVORS, "flux-dev", GUIDED)
        patch.setitem(FLAVORS, "flux-schnell", TINY)
        patch.setitem(FLAVORS, "flux-debug", TINY)
        yield


@pytest.fixture(scope="module")
def digits(folder) -> Path:
    """The folder after README's first run."""
    here(Command("README.md", "./run_train.sh"), folder, *DIGITS)
    return folder


def forget_pictures(folder: Path) -> None:
    """Each document draws into a folder of its own, so to say."""
    for picture in folder.glob("*.png"):
        picture.unlink()


# ---- all of them ------------------------------------------------------------------------------


STARTS = [
    command
    for document in DOCUMENTS
    for command in commands(document)
    if command.words[0].endswith(("run_train.sh", "run_infer.sh"))
]


@pytest.mark.parametrize("command", STARTS, ids=lambda c: f"{c.document}: {c.text}")
def test_every_key_and_option_of_a_start_exists(command, tmp_path):
    """And has a value of its type; what runs the command is slow, or long."""
    words = [word for word in command.words[1:] if word != "--check"]
    if "--from-png" in words:
        return  # all that it needs is in the picture
    write_own_files(tmp_path)
    config = Settings.read(command.environment).config_file
    if "--job.config_file" not in words:
        own = tmp_path / config
        words += ["--job.config_file", str(own if own.exists() else config)]
    read_config(infer.parse(words)[1] if "infer" in command.words[0] else words)


# ---- README.md --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_readme(digits):
    """On the run that the first command left; what is a shell script, by the shell."""
    forget_pictures(digits)
    off = ("--sampling.no-enable", "--score.no-enable", "--validation.no-enable")
    for command in claimed(__file__, "test_the_readme"):
        program, words = command.words[0], command.words
        if program == "tensorboard":
            assert "loss_metrics/global_avg_loss" in tensorboard(command, digits)
        elif program == "python":
            said = "contact_sheet.png" if "--count" in words else "report.html"
            assert said in here(command, digits)
        elif program == "./run_infer.sh":
            shell(command, digits, *(("--steps", "2") if "--prompt" in words else ()))
        elif "--check" in words:
            assert "is sound: flux-digits on digits at 8x8" in shell(command, digits)
        elif "CONFIG_FILE" in command.environment:
            tiny = ("--model.flavor", "flux-tiny", "--training.steps", "2")
            assert "step:     2  loss" in shell(command, digits, *SMALL, *tiny)
        else:
            small = ("--training.steps", "2", "--metrics.log_freq", "1", *off)
            assert "step:     2  loss" in shell(command, digits, *small)
    assert pixels(digits / "again.png") == pixels(digits / "seven.png")
    assert "<html" in (digits / "outputs/flux_digits/report.html").read_text(encoding="utf-8")
    for run in ("longer", "two"):
        assert (digits / "outputs" / run / "checkpoint/step-2/manifest.json").is_file()


@pytest.mark.long
def test_the_score(digits):
    (command,) = claimed(__file__, "test_the_score")
    assert "10 read as prompted" in here(command, digits, "--count", "10", *DIGITS)


def tensorboard(command: Command, folder: Path) -> str:
    """The names of the scalars that its server shows."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *command.words[1:], "--port", "0"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        address = next(a for line in server.stderr if (a := re.search(r"http://\S+", line)))
        end = time.monotonic() + 60
        shown = "{}"
        while shown == "{}" and time.monotonic() < end:  # it reads the files in the background
            with urllib.request.urlopen(f"{address[0]}data/plugin/scalars/tags") as answer:
                shown = answer.read().decode()
            time.sleep(0.2)
        return shown
    finally:
        server.terminate()
        server.wait()


# ---- docs/data.md, docs/inference.md, docs/guide.md -------------------------------------------


@pytest.mark.long
def test_data(folder, monkeypatch):
    """On a small model, for two steps."""
    small = (*SMALL, "--model.flavor", "flux-tiny", "--training.steps", "2")
    monkeypatch.setattr(hub_server._Handler, "do_GET", data_set)
    monkeypatch.setattr(hub_server._Handler, "do_HEAD", data_set)
    for number, command in enumerate(claimed(__file__, "test_data")):
        if command.words[0] == "hf":
            download(command, folder)
            continue
        if "scripts/inspect_data.py" in command.words:
            assert "sheet: outputs/debug_model/contact_sheet.png" in here(command, folder)
            continue
        dump = folder / "outputs" / f"data-{number}"
        said = here(command, folder, *small, "--job.dump_folder", str(dump))
        assert re.search(r"step: +2  loss", said), said
        assert "validate step" in said
        assert not (dump / "quarantine.jsonl").exists()


def download(command: Command, folder: Path) -> None:
    """By the hub's own program, from a hub that has the data set."""
    images = folder / "data/tables/pictures.parquet"
    table = pyarrow.parquet.read_table(images).rename_columns(["image", "caption"])
    coco = io.BytesIO()
    pyarrow.parquet.write_table(table, coco)
    shard = next((REPO / "tests/assets/cc12m_test").glob("*.tar")).read_bytes()
    files = {
        "pixparse/cc12m-wds": {"cc12m-train-0000.tar": shard, "README.md": b""},
        "howard-hou/COCO-Text": {
            "data/train-00000.parquet": coco.getvalue(),
            "data/validation-00000.parquet": coco.getvalue(),
        },
    }[command.words[2]]
    hub = hub_server.HubServer(files, f"datasets/{command.words[2]}", gated_for=())
    with hub_server.serving(hub):
        environment = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        shell(command, folder, **environment, HF_HOME=str(folder / "home"), HF_TOKEN="")


def data_set(self: hub_server._Handler, get=hub_server._Handler.do_GET) -> None:
    """`do_GET` of a hub whose repository is a data set."""
    if "/tree/" in self.path:
        hub = self.hub
        entries = [(name, len(content), hub.blob_id(name)) for name, content in hub.files.items()]
        names = ("path", "size", "oid")
        self._json([{"type": "file", **dict(zip(names, e, strict=True))} for e in entries])
        return
    self.path = self.path.replace("/api/datasets/", "/api/models/datasets/")
    get(self)


@pytest.mark.long
def test_drawing(digits, tiny_flavors):
    for command in claimed(__file__, "test_drawing"):
        words = command.words
        if "--estimate" in words:
            assert "--low_memory: " in here(command, digits)
            continue
        out = digits / words[words.index("--out") + 1]
        if "--overwrite" not in words:  # an earlier document's
            for earlier in sorted(out.glob("*.png")) if out.is_dir() else [out]:
                earlier.unlink(missing_ok=True)
        here(command, digits, *(() if "--from-png" in words else ("--steps", "2")))
        if "--count" in words:
            assert len(list(digits.glob(f"{out.stem}-?{out.suffix}"))) == 4
            continue
        drawn = sorted(out.glob("*.png")) if out.is_dir() else [out]
        assert len(drawn) == (2 if out.is_dir() else 1)
        for path in drawn:
            with Image.open(path) as picture:
                assert picture.text["steps"] == "2"  # type: ignore[attr-defined]
                assert picture.size == ((512, 512) if path.name == "fox.png" else (8, 8))
    assert pixels(digits / "again.png") == pixels(digits / "seven.png"), "with --low_memory, too"


@pytest.mark.long
def test_the_guide(folder, tiny_flavors):
    """From a folder of pictures to a picture; a run is stopped, resized and made longer."""
    forget_pictures(folder)
    steps = iter(range(2, 20, 2))
    quick = (*SMALL, "--sampling.denoising_steps", "2", "--sampling.images_per_prompt", "1")
    for command in claimed(__file__, "test_the_guide"):
        config = command.environment.get("CONFIG_FILE")
        if "--check" in command.words:
            more = ENCODERS_OF_TORCHTITAN if config == "theirs.toml" else ()
            assert "The configuration is sound" in here(command, folder, *more)
        elif config == "theirs.toml":
            more = (*ENCODERS_OF_TORCHTITAN, *SMALL, "--training.steps", "2")
            said = here(command, folder, *more)
            assert re.search(r"step: +2  loss", said), said
            assert ("causal attention" in said) == ("--checkpoint.enable" in command.words)
        elif command.words[0].endswith("run_train.sh"):
            last = next(steps) if "outputs/fine" not in command.words else 2
            said = here(command, folder, *quick, "--training.steps", str(last))
            assert re.search(rf"step: +{last}  loss", said), said
            assert (last == 2) == bool(re.search(r"step: +1  loss", said)), "it did not go on"
        else:
            here(command, folder, *(("--steps", "2") if "--prompt" in command.words else ()))
    assert next(steps) == 10, "first, continued, resized and longer"
    assert pixels(folder / "again.png") == pixels(folder / "fox.png")
    assert (folder / "outputs/mine/report.html").is_file()


ENCODERS_OF_TORCHTITAN = (
    "--encoder.t5_encoder", "assets/tiny/t5", "--encoder.clip_encoder", "assets/tiny/clip",
)  # fmt: skip
"""Their files name them on the hub."""


# ---- docs/running.md --------------------------------------------------------------------------


@pytest.mark.long
def test_running(folder, tiny_flavors):
    """Two ranks; then eight, from FLUX.1's weights to diffusers', and a picture from these."""
    forget_pictures(folder)
    fine = folder / "outputs/fine/checkpoint"
    for command in claimed(__file__, "test_running"):
        if command.words[0] == "./run_infer.sh":
            (fine / "step-30000-hf").symlink_to("step-1-hf")
            here(command, folder, "--steps", "2", "--size", "64")
            continue
        few = ("--sampling.no-enable", "--validation.no-enable", "--training.local_batch_size", "1")
        workers = ("--training.dataloader.num_workers", "0")
        if "flux_dev_model" not in command.text:
            few = workers = ()
        shutil.rmtree(folder / "outputs/fine", ignore_errors=True)
        said = here(command, folder, *SMALL, "--training.steps", "1", *few, *workers)
        assert "Saved" in said, said
    assert (fine / "step-1-hf/config.json").is_file()
    with Image.open(folder / "fox.png") as picture:
        assert "step-30000-hf" in picture.text["weights"]  # type: ignore[attr-defined]
