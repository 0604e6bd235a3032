"""Running out of memory, told in one message with what to change."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

GIB = 2**30

_SAID = re.compile(
    r"out of memory|not enough memory: you tried to allocate|DefaultCPUAllocator: can't allocate"
    r"|CUBLAS_STATUS_ALLOC_FAILED|Cannot allocate memory",
    re.IGNORECASE,
)
_WANTED = re.compile(r"tried to allocate ([\d.]+ ?[KMGT]?i?B(?:ytes)?|\d+ bytes)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory could not be had, on whichever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_SAID.search(str(error)))


def told(error: BaseException, remedies: Sequence[str]) -> str:
    """One message: what was wanted, as far as known, and what to change."""
    wanted = _WANTED.search(str(error))
    asked = f" (asked for {wanted[1]} more)" if wanted else ""
    return f"Out of memory{asked}. What helps: {'; '.join(remedies)}"


@contextmanager
def exit_when_out_of_memory(remedies: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Inside, running out of memory ends the process: one message, status 1, no traceback.

    Args:
        remedies: what to change, asked for when it has happened.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        logger.error(told(error, remedies()))
        sys.exit(1)


def note_second_step(
    optimizers: Iterable[Optimizer], device: torch.device, remedies: Callable[[], Sequence[str]]
) -> None:
    """After the first step on a GPU, say what the second will take; call before peaks are reset.

    The optimizer makes its states once the activations of the first step are gone. In the second
    they stand beside them.

    Args:
        optimizers: with states.
        device: of this rank.
        remedies: what to change, asked for when it will not fit.
    """
    tensors = [
        value.to_local() if isinstance(value, DTensor) else value
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    states = sum(tensor.nbytes for tensor in tensors if tensor.device.type == device.type)
    if not states:  # offloaded, or the first step was skipped
        return
    taken = utils.device_module.memory_stats(device)["reserved_bytes.all.peak"]
    memory = utils.device_module.get_device_properties(device).total_memory
    line = (
        f"Memory: the first step took {taken / GIB:.1f} GiB, optimizer states are "
        f"{states / GIB:.1f}: about {(taken + states) / GIB:.1f} of {memory / GIB:.1f} GiB from "
        "the second step on"
    )
    if taken + states > memory:
        logger.warning(f"{line}, which may not fit. What helps: {'; '.join(remedies())}")
    else:
        logger.info(line)


def training_remedies(config) -> list[str]:
    """Keys that make a training step smaller, the ones that are not yet used up first."""
    t, ac = config.training, config.activation_checkpoint
    found = []
    if t.local_batch_size > 1:
        found.append(f"a smaller training.local_batch_size (now {t.local_batch_size})")
    if ac.mode != "full":
        found.append(f'activation_checkpoint.mode = "full" (now "{ac.mode}")')
    elif not ac.offload_inputs:
        found.append("activation_checkpoint.offload_inputs = true")
    if not t.enable_cpu_offload and torch.cuda.is_available():
        found.append("training.enable_cpu_offload = true")
    size = f"{t.img_height or t.img_size}x{t.img_width or t.img_size}"
    found += [
        f"smaller pictures: training.img_size (now {size})",
        "more ranks with parallelism.data_parallel_shard_degree = -1",
        "scripts/plan.py with the same arguments says what fits",
    ]
    if config.sampling.enable and config.sampling.local_batch_size > 1:
        found.insert(
            -1,
            f"if it was a grid: sampling.local_batch_size (now {config.sampling.local_batch_size})",
        )
    return found
