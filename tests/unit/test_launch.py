"""The launcher before any rank starts."""

import pytest

from torchtitan_flux.launch import check, launch
from torchtitan_flux.planning import estimate as fits_module
from torchtitan_flux.planning.estimate import lower_bound
from torchtitan_flux.startup.load_config import ConfigError, load_config

CONFIG = ["--job.config_file", "train_configs/debug_model.toml"]


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
    argv = ["--job.config_file", "train_configs/debug_model.toml", "--model.flavor", "flux-tiny",
            "--parallelism.tensor_parallel_degree", "4"]  # fmt: skip
    assert check("train", argv, 8).parallelism.tensor_parallel_degree == 4
    with pytest.raises(ConfigError, match="does not make the 6 ranks"):
        check("train", argv, 6)
