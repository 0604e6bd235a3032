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
    told,
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


def test_it_is_known_on_every_device():
    assert is_out_of_memory(torch.OutOfMemoryError(CUDA))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert is_out_of_memory(exhausted())
    assert is_out_of_memory(MemoryError())
    for other in (RuntimeError("shapes do not fit"), ValueError("out of memory"), KeyError("a")):
        assert not is_out_of_memory(other)


def test_the_message_says_how_much_was_wanted():
    assert "(asked for 2.00 GiB more)" in told(torch.OutOfMemoryError(CUDA), ["less"])
    assert f"(asked for {2**48} bytes more)" in told(exhausted(), ["less"])
    assert told(MemoryError(), ["this", "that"]) == "Out of memory. What helps: this; that"


def test_it_ends_the_process_and_other_errors_do_not(caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.ERROR)
    with pytest.raises(SystemExit) as leaving, exit_when_out_of_memory(lambda: ["less"]):
        raise torch.OutOfMemoryError(CUDA)
    assert leaving.value.code == 1
    assert [record.getMessage() for record in caplog.records] == [
        "Out of memory (asked for 2.00 GiB more). What helps: less"
    ]
    with pytest.raises(RuntimeError, match="shapes"), exit_when_out_of_memory(lambda: ["less"]):
        raise RuntimeError("shapes do not fit")


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
    assert "the first step took 5.5 GiB, optimizer states are 2.0: about 7.5 of" in record.message
    assert (record.levelno == logging.INFO) == fits
    assert ("What helps: less" in record.message) != fits
