"""The launcher before any rank starts: its options, what is missing, what --check opens."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from unit.config.refusals import TINY

from torchtitan_flux.launch import check, launch
from torchtitan_flux.planning import estimate as fits_module
from torchtitan_flux.planning.estimate import lower_bound
from torchtitan_flux.startup.load_config import ConfigError, load_config

REPO = Path(__file__).resolve().parents[2]
SCHNELL = "./torchtitan/models/flux/train_configs/flux_schnell_model.toml"
CONFIG = ["--job.config_file", "train_configs/debug_model.toml"]
TINY_MODEL = ("--model.flavor", "flux-tiny")
PARTS = {
    "text_encoder": "clip/config.json clip/model.safetensors",
    "text_encoder_2": "t5/config.json t5/model.safetensors",
    "tokenizer": "clip/tokenizer.json clip/tokenizer_config.json clip/special_tokens_map.json",
    "tokenizer_2": "t5/tokenizer.json t5/tokenizer_config.json t5/special_tokens_map.json",
}
"""Folders of a FLUX.1 repository, filled with tiny parts of the same formats."""

COMMAND = "`python scripts/download_hf_assets.py --repo_id black-forest-labs/FLUX.1-schnell "


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in ("CONFIG_FILE", "NGPU"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def downloads(folder) -> Path:
    """Stand-ins for everything that the schnell file reads."""
    there = folder / "assets/hf/FLUX.1-schnell"
    for part, files in PARTS.items():
        (there / part).mkdir(parents=True)
        for name in files.split():
            (there / part / Path(name).name).symlink_to(TINY / name)
    (there / "ae.safetensors").symlink_to(TINY / "ae.safetensors")
    return there


def test_a_run_without_its_downloads_stops_at_once(folder):
    """Through the paths that torchtitan's users type: every missing part, and one command."""
    environment = {**os.environ, "CONFIG_FILE": SCHNELL, "PYTHON": sys.executable}
    result = subprocess.run(
        [REPO / "torchtitan/models/flux/run_train.sh"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("The configuration cannot run:\n")
    for part in ("text_encoder", "text_encoder_2", "ae.safetensors"):
        assert f"assets/hf/FLUX.1-schnell/{part}" in result.stderr.split("is downloaded")[0]
    options = "--assets text_encoder tokenizer text_encoder_2 tokenizer_2 --additional_patterns ae"
    assert f"{COMMAND}{options}.safetensors --hf_token <token>`" in result.stderr
    assert len(result.stderr.splitlines()) == 5
    assert not list(folder.iterdir())


def test_a_run_with_its_downloads_is_sound(downloads, capsys):
    assert launch("train", ["--check", "--job.config_file", SCHNELL, *TINY_MODEL]) == 0
    printed = capsys.readouterr().out
    assert printed == (
        "The configuration is sound: flux-tiny on shapes at 256x256, 30000 steps, 1 rank(s), into "
        "./outputs/flux_schnell\n"
    )
    assert [path.name for path in downloads.parents[2].iterdir()] == ["assets"]


@pytest.mark.parametrize(
    ("gone", "options"),
    [
        ("text_encoder/config.json", "--assets text_encoder tokenizer"),
        ("text_encoder_2/model.safetensors", "--assets text_encoder_2 tokenizer_2"),
        ("tokenizer/tokenizer.json", "--assets text_encoder tokenizer"),
        ("tokenizer_2/tokenizer.json", "--assets text_encoder_2 tokenizer_2"),
        ("ae.safetensors", "--additional_patterns ae.safetensors"),
    ],
)
def test_one_missing_file_is_named(downloads, gone, options):
    (downloads / gone).unlink()
    with pytest.raises(ConfigError) as error:
        load_config(["--job.config_file", SCHNELL, *TINY_MODEL])
    missing, command = error.value.found
    assert str(Path(gone).name if "/" not in gone else Path(gone).parent) in missing
    assert f"{COMMAND}{options} --hf_token <token>`" in command


def test_a_download_that_was_cut_is_not_taken_for_whole(downloads):
    weights = downloads / "text_encoder_2/model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match="text_encoder_2/model"):
        load_config(["--job.config_file", SCHNELL, *TINY_MODEL])


def test_print_config_prints_what_a_run_can_read(folder, capsys):
    arguments = ["--print-config", "--training.steps", "7"]
    assert launch("train", arguments) == 0
    (folder / "printed.toml").write_text(capsys.readouterr().out)
    again = load_config(["--job.config_file", "printed.toml"])
    assert (again.training.steps, again.training.dataset) == (7, "digits")
    assert [path.name for path in folder.iterdir()] == ["printed.toml"]


def test_help_is_printed_whatever_else_is_given(folder, capsys):
    assert launch("train", ["--training.stepps", "3", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "classifier_free_guidance_prob = 0.0" in printed


def test_a_wrong_configuration_is_refused_there_too(folder, capsys):
    with pytest.raises(SystemExit) as leaving:
        launch("train", ["--print-config", "--training.stepps", "3"])
    assert leaving.value.code == 2
    assert "did you mean training.steps?" in capsys.readouterr().err
    assert not list(folder.iterdir())


def test_check_judges_memory_with_the_ranks_of_a_machine(monkeypatch, capsys):
    """Two of them fit, four share what two need; the environment of ranks says nothing here."""
    need = sum(lower_bound(load_config(CONFIG), 1).values())

    class Machine:
        total_memory = 3 * need

    device = fits_module.utils.device_module
    monkeypatch.setattr(device, "get_device_properties", lambda _=None: Machine, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for ranks, replicas in ((2, "2"), (4, "4")):
        monkeypatch.setenv("NGPU", str(ranks))
        argv = [*CONFIG, "--parallelism.data_parallel_replicate_degree", replicas, "--check"]
        if ranks == 2:
            assert launch("train", argv) == 0
            assert "The configuration is sound" in capsys.readouterr().out
        else:
            with pytest.raises(SystemExit) as leaving:
                launch("train", argv)
            assert leaving.value.code == 2
            assert "the run needs at least" in capsys.readouterr().err


def test_the_check_counts_the_ranks_that_are_asked_for(monkeypatch):
    """Not those that some environment names: it and the ranks agree."""
    monkeypatch.setenv("WORLD_SIZE", "5")
    argv = [*CONFIG, *TINY_MODEL, "--parallelism.tensor_parallel_degree", "4"]
    assert check("train", argv, 8).parallelism.tensor_parallel_degree == 4
    with pytest.raises(ConfigError, match="does not make the 6 ranks"):
        check("train", argv, 6)


def check_data(dataset: str, path: object, *keys: str) -> int:
    data = ("--training.dataset", dataset, "--training.dataset_path", str(path))
    return launch("train", ["--check", "--validation.no-enable", "--score.no-enable", *data, *keys])


@pytest.fixture
def pictures(tmp_path):
    """A folder with one picture, without a caption."""
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    return tmp_path


def test_sound_data_are_sound(pictures, capsys):
    assert check_data("folder", pictures, "--data.default_caption", "") == 0
    (pictures / "a.txt").write_text("a square")
    assert check_data("folder", pictures) == 0
    assert capsys.readouterr().out.count("The configuration is sound") == 2


def test_no_caption_at_all_and_a_wrong_key_are_one_report(pictures, capsys):
    with pytest.raises(SystemExit) as end:
        check_data("folder", pictures, "--optimizer.lr", "-1")
    assert end.value.code == 2
    report = capsys.readouterr().err
    assert "optimizer.lr = -1.0: must be a number from 0" in report
    assert "training.dataset_path: none of the 1 items" in report
    assert "has no caption (a.png)" in report


@pytest.mark.parametrize(
    ("dataset", "path", "problem"),
    [
        ("folder", "", "holds no pictures"),
        ("webdataset", "{0..3}.tar", "0.tar does not exist"),
        ("folder", None, "training.dataset_path"),  # the key is wrong: nothing is opened
    ],
)
def test_data_that_are_not_there(tmp_path, dataset, path, problem, capsys):
    with pytest.raises(SystemExit):
        check_data(dataset, "" if path is None else tmp_path / path)
    assert capsys.readouterr().err.count(problem) == 1
