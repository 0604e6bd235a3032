"""Environment variables -> settings, or one list of what is wrong."""

import pytest
import torch

from torchtitan_flux.launch import launch
from torchtitan_flux.launching.settings import Settings
from torchtitan_flux.startup.load_config import ConfigError


def test_each_rank_wants_a_card_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("NGPU", "3")
    with pytest.raises(SystemExit, match="2"):
        launch("train", ["--parallelism.data_parallel_replicate_degree", "3"])
    assert "NGPU: 3 ranks, and 2 GPUs can be seen" in capsys.readouterr().err


def test_nothing_set_is_one_rank_of_the_default_run():
    settings = Settings.read({"NGPU": "", "HOME": "/root"})
    assert settings == Settings()
    assert (settings.ranks, settings.shown, settings.grace) == (1, {0}, 600)


def test_all_set():
    settings = Settings.read(
        {"NGPU": "8", "NNODES": "2", "NODE_RANK": "1", "RDZV_ENDPOINT": "node0:29500",
         "LOG_RANK": "0, 15", "GRACE": "30", "CONFIG_FILE": "a.toml"}
    )  # fmt: skip
    assert settings == Settings(8, 2, 1, "node0:29500", frozenset({0, 15}), 30, "a.toml")
    assert settings.ranks == 16


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"NGPU": "two"}, "NGPU = 'two'"),
        ({"NNODES": "0"}, "NNODES = '0'"),
        ({"NGPU": "2", "LOG_RANK": "5"}, "must list ranks from 0 to 1"),
        ({"LOG_RANK": "0,"}, "LOG_RANK"),
        ({"NODE_RANK": "1"}, "NODE_RANK"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "node0:29500"}, "NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "RDZV_ENDPOINT = '' must be host:port"),
        ({"NNODES": "2", "NODE_RANK": "1", "RDZV_ENDPOINT": "node0:70000"}, "must be host:port"),
        ({"GRACE": "ten"}, "GRACE"),
    ],
)
def test_a_wrong_value_is_named(wrong, named):
    with pytest.raises(ConfigError) as caught:
        Settings.read(wrong)
    assert named in str(caught.value)
    assert str(caught.value).count("\n") == 0, "one variable, one line"


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        Settings.read({"NGPU": "two", "NNODES": "2", "LOG_RANK": "all", "GRACE": "-1"})
    for name in ("NGPU", "NODE_RANK", "RDZV_ENDPOINT", "LOG_RANK", "GRACE"):
        assert name in str(caught.value)
