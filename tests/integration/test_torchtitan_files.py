"""Files and command lines that were written for torchtitan's own FLUX run here as they are."""

import logging
from pathlib import Path

import pytest
import tomli
from ranks import run_ranks
from tiny_run import train

from torchtitan_flux.config.meanings import NOT_USED
from torchtitan_flux.config.schema import get
from torchtitan_flux.startup.load_config import ConfigError, load_config

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "torchtitan"
FILES = ("debug_model", "flux_dev_model", "flux_schnell_model")
TINY = ("--model.flavor", "flux-tiny")
PATHS = (
    "--encoder.t5_encoder", "assets/tiny/t5",
    "--encoder.clip_encoder", "assets/tiny/clip",
    "--encoder.autoencoder_path", "assets/tiny/ae.safetensors",
    "--training.dataset_path", "tests/assets/cc12m_test",
)  # fmt: skip
"""All that has to be named: the hub is not at hand, and the data are not there."""


def argv(name: str, *more: str) -> list[str]:
    return ["--job.config_file", str(FOLDER / f"{name}.toml"), *PATHS, *more]


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_honoured_or_its_difference_is_said(name, caplog):
    with caplog.at_level(logging.WARNING):
        config = load_config(argv(name, *(TINY if name != "debug_model" else ())))
    said = [record.getMessage() for record in caplog.records]
    with (FOLDER / f"{name}.toml").open("rb") as file:
        sections = tomli.load(file)
    changed = {"model.flavor", *(path.removeprefix("--") for path in PATHS[::2])}
    silent = []
    for section, values in sections.items():
        for key, value in values.items():
            full = f"{section}.{key}"
            assert full in changed or get(config, full) == value, full
            if full in NOT_USED and not any(full in line for line in said):
                silent.append(full)
    assert silent == [], "not used, and nobody says so"
    reasons = {line.partition(": not used; ")[2] for line in said}
    assert len(reasons) == len(said), "a line for each reason"


def test_their_command_lines_mean_the_same(tmp_path, monkeypatch):
    """Those of torchtitan's own integration tests."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = load_config(
        [
            f"--job.config_file={FOLDER / 'debug_model.toml'}",
            "--training.test_mode",
            "--training.dataset-path=tests/assets/cc12m_test",
            "--parallelism.data_parallel_shard_degree=4",
            "--parallelism.data_parallel_replicate_degree", "2",
            "--validation.enable", "--validation.steps", "5", "--validation.no-all_timesteps",
            "--validation.dataset_path", "tests/assets/cc12m_test",
            "--validation.dataset", "cc12m-test",
            "--checkpoint.enable", "--checkpoint.no-last-save-model-only",
            "--encoder.t5_encoder", "tests/assets/flux_test_encoders/t5-v1_1-xxl/",
            "--job.dump_folder", str(tmp_path),
            "--metrics.log_freq", "1", "--debug.seed", "42",
        ]
    )  # fmt: skip
    assert config.encoder.t5_encoder == "assets/tiny/t5", "test_mode outranks paths, as there"
    assert config.parallelism.data_parallel_replicate_degree == 2
    assert config.checkpoint.last_save_model_only is False
    assert config.validation.all_timesteps is False
    assert config.training.dataset_path == "tests/assets/cc12m_test"


def test_what_has_to_be_downloaded_is_named_with_the_command(tmp_path, monkeypatch):
    """As it is, without the hub: the autoencoder and the data set."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_config(["--job.config_file", str(FOLDER / "flux_dev_model.toml")])
    report = str(error.value)
    assert "assets/hf/FLUX.1-dev/ae.safetensors does not exist" in report
    assert (
        "python scripts/download_hf_assets.py --repo_id black-forest-labs/FLUX.1-dev "
        "--additional_patterns ae.safetensors --hf_token <token>" in report
    )
    assert "hf download pixparse/cc12m-wds" in report


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_they_train(name, tmp_path):
    """Two images a step for two steps; at their own sizes below."""
    more = ("--training.steps", "2", "--training.local_batch_size", "2")
    dump = ("--job.dump_folder", str(tmp_path), "--metrics.log_freq", "1")
    (run,) = run_ranks(1, train, argv(name, *TINY, *more, *dump))
    assert run.error == ""
    assert sorted(run.losses) == [1, 2]
    assert all(0 < loss < 4 for loss in run.losses.values())
    again = load_config(["--job.config_file", str(tmp_path / "config.toml")])
    assert (again.training.steps, again.model.flavor) == (2, "flux-tiny")
    assert again.debug.seed is not None, "the seed that was drawn"
