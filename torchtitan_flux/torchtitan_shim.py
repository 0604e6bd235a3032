"""Imported before torchtitan: presents the CPU as the device on a machine without a GPU.

torchtitan 0.2.2 binds "cuda" at import when it sees no accelerator, asks the device module for
things that torch.cpu lacks, and imports triton. Here a small proxy stands in as torchtitan's
device module while torch.cpu itself stays untouched, and torchtitan's triton kernels are passed
over where there is no triton (CPU builds of torch bring none).
"""

import ctypes
import importlib.util
import logging
import os
import resource
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch._utils

# Where it is installed, transformers imports it, and it warns of kernels that float8 does not use.
logging.getLogger("torchao").setLevel(logging.ERROR)

MOE_KERNELS = "torchtitan.models.moe.kernels"
PEAK_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class CpuDevice(types.ModuleType):
    """The device module that torchtitan sees on CPU: torch.cpu plus what torchtitan asks for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def set_device(self, device: Any) -> None:
        """There is one CPU."""

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return "CPU"

    def get_device_properties(self, device: Any = None) -> types.SimpleNamespace:
        return types.SimpleNamespace(total_memory=_physical_memory())

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        """Peak resident memory of the process in bytes, under the names of the CUDA allocator."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_RSS_UNIT
        return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak}

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """The kernel keeps the peak of the whole life of the process."""

    def empty_cache(self) -> None:
        """Nothing is cached."""


def _physical_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its cgroup's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


def local_ranks() -> int:
    """Ranks on this machine: they share its CPU memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def keep_freed_memory() -> None:
    """Have glibc reuse what is freed instead of returning it to the system.

    A step on the CPU takes and frees gigabytes in large pieces; fetched as fresh pages each time
    they are a third of a step of flux-debug (docs/benchmarks.md).
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_MAX, 0)  # large pieces come from the heap, too,
        set_option(M_TRIM_THRESHOLD, -1)  # whose free end stays


def give_back_freed_memory() -> None:
    """Return what was freed to the system, where the C library (glibc) can: a process that saves
    for weeks would seem to grow."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _import_torchtitan() -> None:
    """Import torchtitan; where triton is missing, without its one module of triton kernels.

    Those serve mixture-of-experts models alone, which FLUX is not.
    """
    if importlib.util.find_spec("triton") is None:
        kernels = types.ModuleType(MOE_KERNELS)
        kernels.generate_permute_indices = None  # type: ignore[attr-defined]
        sys.modules[MOE_KERNELS] = kernels
    import torchtitan.models.moe
    import torchtitan.tools.utils  # noqa: F401


def present_device() -> None:
    """Import torchtitan with the right device; done once, when this module is imported."""
    if torch.cuda.is_available():
        _import_torchtitan()
        return
    if "torchtitan.tools.utils" in sys.modules:
        raise RuntimeError(
            "torchtitan was imported before torchtitan_flux on a machine without a GPU; "
            "start with `python -m torchtitan_flux.train` (run_train.sh does)"
        )
    found_type = torch._utils._get_available_device_type
    found_module = torch._utils._get_device_module
    device = CpuDevice("torchtitan_flux.torchtitan_shim.cpu")
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda _type: device  # type: ignore[assignment]
    try:
        _import_torchtitan()
    finally:
        torch._utils._get_available_device_type = found_type
        torch._utils._get_device_module = found_module
    import torchtitan.tools.utils

    # it would look for lspci, and take any CPU for an A100
    torchtitan.tools.utils.get_peak_flops = lambda device_name: float("nan")


present_device()
