"""Running out of memory: one message with what to change."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torch.optim import Optimizer
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.formatting import format_bytes
from torchtitan_flux.optimizers import local

_MESSAGE = re.compile(
    r"out of memory|not enough memory: you tried to allocate|DefaultCPUAllocator: can't allocate"
    r"|CUBLAS_STATUS_ALLOC_FAILED|Cannot allocate memory",
    re.IGNORECASE,
)
_WANTED = re.compile(r"tried to allocate ([\d.]+ ?[KMGT]?i?B(?:ytes)?|\d+ bytes)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory could not be had, on whichever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_MESSAGE.search(str(error)))


@contextmanager
def exit_when_out_of_memory(remedies: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Inside, running out of memory ends the process: one message, status 1, no traceback."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        wanted = _WANTED.search(str(error))
        asked = f" (asked for {wanted[1]} more)" if wanted else ""
        logger.error(f"Out of memory{asked}. What helps: {'; '.join(remedies())}")
        sys.exit(1)


def note_second_step(
    optimizers: Iterable[Optimizer], device: torch.device, remedies: Callable[[], Sequence[str]]
) -> None:
    """After the first step on a GPU, say what the second will take; call before peaks are reset.

    The optimizer makes its states once the activations of the first step are gone. In the second
    they stand beside them.
    """
    values = (v for one in optimizers for state in one.state.values() for v in state.values())
    tensors = [local(value) for value in values if isinstance(value, torch.Tensor)]
    states = sum(tensor.nbytes for tensor in tensors if tensor.device.type == device.type)
    if not states:  # offloaded, or the first step was skipped
        return
    taken = utils.device_module.memory_stats(device)["reserved_bytes.all.peak"]
    memory = utils.device_module.get_device_properties(device).total_memory
    line = (
        f"Memory: the first step took {format_bytes(taken)}, optimizer states are "
        f"{format_bytes(states)}: about {format_bytes(taken + states)} of {format_bytes(memory)} "
        "from the second step on"
    )
    if taken + states > memory:
        logger.warning(f"{line}, which may not fit. What helps: {'; '.join(remedies())}")
    else:
        logger.info(line)


def training_remedies(config: FluxJobConfig) -> list[str]:
    """Keys that make a training step smaller, the ones that are not yet used up first."""
    t, ac, sampling = config.training, config.activation_checkpoint, config.sampling
    grids = sampling.local_batch_size if sampling.enable else 1
    offload = not t.enable_cpu_offload and torch.cuda.is_available()
    remedies = {
        f"a smaller training.local_batch_size (now {t.local_batch_size})": t.local_batch_size > 1,
        f'activation_checkpoint.mode = "full" (now "{ac.mode}")': ac.mode != "full",
        "a training.global_batch_size of one microbatch": t.global_batch_size > t.local_batch_size,
        "activation_checkpoint.offload_inputs = true": ac.mode == "full" and not ac.offload_inputs,
        "training.enable_cpu_offload = true": offload,
        f"smaller images: training.img_size (now {t.image_size})": True,
        "more ranks: parallelism.data_parallel_shard_degree = -1, or context_parallel_degree": True,
        f"if it was a grid: sampling.local_batch_size (now {grids})": grids > 1,
        "scripts/plan.py with the same arguments says what fits": True,
    }
    return [remedy for remedy, possible in remedies.items() if possible]
