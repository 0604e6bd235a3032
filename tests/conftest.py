"""Shared by all tests: shape annotations are checked at run time, threads are kept few."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# ranks are forked gloo processes; a GPU, where there is one, is not for them
# tests/cuda start programs that see the cards as given
os.environ.setdefault("CARDS_AS_GIVEN", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def _signals_as_before():
    """A handler or mask that a test leaves behind is inherited by what later tests fork."""

    def signals() -> tuple:
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        return handlers, signal.pthread_sigmask(signal.SIG_BLOCK, [])

    before = signals()
    yield
    assert signals() == before
