"""The card is asked for through the driver, so that the launcher takes no memory on it."""

import ctypes

import pytest
import torch

from torchtitan_flux.parallel import card as device
from torchtitan_flux.parallel.card import Card, card


class Driver:
    """libcuda with one Tesla T4, as far as it is asked."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def cuInit(self, flags: int) -> int:
        return int(self.fails == "init")

    def cuDeviceGet(self, out, number: int) -> int:
        out._obj.value = 40 + number
        return int(self.fails == "get")

    def cuDeviceGetName(self, out, size: int, handle: ctypes.c_int) -> int:
        assert handle.value == 40
        out.value = b"Tesla T4"
        return 0

    def cuDeviceGetAttribute(self, out, attribute: int, handle: ctypes.c_int) -> int:
        assert handle.value == 40
        out._obj.value = {75: 7, 76: 5}[attribute]
        return 0


@pytest.fixture
def contexts(monkeypatch) -> list[str]:
    """A machine with a GPU; what torch is asked, for which it makes a context."""
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: asked.append("name") or "H200")
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda: asked.append("capability") or (9, 0)
    )
    return asked


def test_the_driver_is_asked(monkeypatch, contexts):
    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: Driver())
    assert card() == Card("Tesla T4", (7, 5))
    assert str(card()) == "Tesla T4 has 7.5"
    assert contexts == []


@pytest.mark.parametrize("fails", ["load", "init", "get"])
def test_torch_is_asked_where_the_driver_does_not_answer(monkeypatch, contexts, fails):
    def load(_: str) -> Driver:
        if fails == "load":
            raise OSError("no such library")
        return Driver(fails)

    monkeypatch.setattr(device.ctypes, "CDLL", load)
    assert card() == Card("H200", (9, 0))
    assert contexts == ["name", "capability"]


def test_there_may_be_no_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert card() is None
