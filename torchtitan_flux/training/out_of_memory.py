"""Running out of memory, told in one message with what to change."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torchtitan_flux.engine  # noqa: F401  (before torchtitan)

import torch
from torchtitan.tools.logging import logger

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
