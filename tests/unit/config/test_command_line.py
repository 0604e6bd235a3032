"""The launcher's own options, what has to be downloaded, and one wrong run from end to end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from unit.config.refusals import TINY

from torchtitan_flux.launch import launch
from torchtitan_flux.startup.load_config import ConfigError, load_config

REPO = Path(__file__).resolve().parents[3]
SCHNELL = "./torchtitan/models/flux/train_configs/flux_schnell_model.toml"
TINY_MODEL = ("--model.flavor", "flux-tiny")
PARTS = {
    "text_encoder": "clip/config.json clip/model.safetensors",
    "text_encoder_2": "t5/config.json t5/model.safetensors",
    "tokenizer": "clip/tokenizer.json clip/tokenizer_config.json clip/special_tokens_map.json",
    "tokenizer_2": "t5/tokenizer.json t5/tokenizer_config.json t5/special_tokens_map.json",
}
"""Folders of a FLUX.1 repository, filled with tiny parts of the same formats."""

COMMAND = (
    "`python scripts/download_hf_assets.py --repo_id black-forest-labs/FLUX.1-schnell --assets "
    "text_encoder text_encoder_2 tokenizer tokenizer_2 --additional_patterns ae.safetensors "
    "--hf_token <token>`"
)


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
    assert COMMAND in result.stderr
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
    "gone",
    [
        *("text_encoder/config.json", "text_encoder_2/model.safetensors", "ae.safetensors"),
        *("tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json"),
    ],
)
def test_one_missing_file_is_named(downloads, gone):
    (downloads / gone).unlink()
    with pytest.raises(ConfigError) as error:
        load_config(["--job.config_file", SCHNELL, *TINY_MODEL])
    missing, command = error.value.found
    assert str(Path(gone).name if "/" not in gone else Path(gone).parent) in missing
    assert COMMAND in command


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
