"""What card this process computes on, asked without taking memory on it."""

import ctypes
from dataclasses import dataclass

import torch

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


@dataclass(frozen=True)
class Card:
    """A GPU: its name and compute capability (on ROCm: gfx version)."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name} has {major}.{minor}"


def card() -> Card | None:
    """This process's first GPU; None on a machine without one.

    The driver is asked where it can be: torch would make a context, which holds some hundred
    megabytes of the card for as long as the launcher lives.
    """
    if not torch.cuda.is_available():
        return None
    return _from_driver() or Card(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def _from_driver() -> Card | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # ROCm, or another system
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    return None if failed else Card(name.value.decode(), (major.value, minor.value))
