"""Running out of memory, wherever: one message, status 1."""

import logging
from types import SimpleNamespace

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from torchtitan_flux.startup.load_config import load_config
from torchtitan_flux.training.out_of_memory import (
    exit_when_out_of_memory,
    is_out_of_memory,
    note_second_step,
    training_remedies,
)

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.78 GiB of "
    "which 1.03 GiB is free."
)


def exhausted() -> RuntimeError:
    """What torch really raises on a CPU."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**46)
    return raised.value


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError(CUDA), " (asked for 2.00 GiB more)"),
        (RuntimeError("CUDA error: out of memory"), ""),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), ""),
        (exhausted(), f" (asked for {2**48} bytes more)"),
        (MemoryError(), ""),
    ],
)
def test_it_ends_the_process_with_one_message(error, asked, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.ERROR)
    with pytest.raises(SystemExit) as leaving, exit_when_out_of_memory(lambda: ["less", "more"]):
        raise error
    assert leaving.value.code == 1
    (record,) = caplog.records
    assert record.getMessage() == f"Out of memory{asked}. What helps: less; more"


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("out of memory"), KeyError()])
def test_other_errors_do_not(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), exit_when_out_of_memory(lambda: ["less"]):
        raise error


def test_remedies_are_keys_that_can_still_be_changed():
    config = load_config(["--job.config_file", "train_configs/debug_model.toml"])
    config.activation_checkpoint.mode = "full"
    said = "; ".join(training_remedies(config))
    assert "training.local_batch_size (now 4)" in said
    assert "activation_checkpoint.offload_inputs" in said
    assert "activation_checkpoint.mode" not in said, "it is full already"
    config.training.local_batch_size = 1
    config.activation_checkpoint.mode = "none"
    said = "; ".join(training_remedies(config))
    assert "local_batch_size" not in said
    assert 'activation_checkpoint.mode = "full" (now "none")' in said


@pytest.mark.parametrize(("card", "fits"), [(8, True), (7, False)])
def test_after_the_first_step_the_second_is_told(card, fits, caplog, monkeypatch):
    """A parameter of 1 GiB has states of 2, which were not there when 5.5 GiB were taken."""
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO)
    stats = {"reserved_bytes.all.peak": 11 * 2**29}
    monkeypatch.setattr(utils.device_module, "memory_stats", lambda _: stats, raising=False)
    properties = SimpleNamespace(total_memory=card * 2**30)
    monkeypatch.setattr(
        utils.device_module, "get_device_properties", lambda _: properties, raising=False
    )
    meta = torch.device("meta")
    parameter = torch.empty(2**28, device=meta, requires_grad=True)
    parameter.grad = torch.empty_like(parameter)
    optimizer = torch.optim.AdamW([parameter], foreach=False)
    note_second_step([optimizer], meta, lambda: ["less"])
    assert not caplog.records, "there are no states yet"
    optimizer.step()
    note_second_step([optimizer], meta, lambda: ["less"])
    (record,) = caplog.records
    assert "took 5.5 GiB, optimizer states are 2.0 GiB: about 7.5 GiB of" in record.message
    assert (record.levelno == logging.INFO) == fits
    assert ("What helps: less" in record.message) != fits
