"""Machines that meet, on loopback: each a thread with settings of its own."""

import socket
import threading
import time
from dataclasses import replace

import pytest
from torch.distributed import Store

from torchtitan_flux.launching import joining
from torchtitan_flux.launching.job import FAILED, Job
from torchtitan_flux.launching.joining import NotJoined, join
from torchtitan_flux.launching.settings import Settings


@pytest.fixture
def two(monkeypatch) -> Settings:
    """Settings of the first of two machines."""
    monkeypatch.setattr(joining, "PERIOD", 0.02)
    monkeypatch.setattr(joining.os, "getpid", threading.get_ident)  # as processes of their own
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return Settings(nodes=2, endpoint=f"localhost:{free.getsockname()[1]}")


STORES: list[Store] = []
"""Kept: the first machine's serves those that look once more."""


def together(*machines: Settings, timeout: float = 10.0) -> list[str]:
    """How each of them fared, started one after the other: "" or what NotJoined said."""
    found = ["?"] * len(machines)

    def one(index: int) -> None:
        time.sleep(index * 0.2)
        try:
            STORES.append(join(machines[index], timeout, lambda line: None))
            found[index] = ""
        except NotJoined as error:
            found[index] = str(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(machines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0)])
def test_machines_meet_in_any_order(two, numbers):
    assert together(*(replace(two, node_rank=number) for number in numbers)) == ["", ""]


def test_a_machine_that_is_started_again_is_joined(two):
    """The second of three leaves and comes again with other settings, the third comes late."""
    three, found = replace(two, nodes=3), []
    others = [three, replace(three, node_rank=2)]
    first = threading.Thread(target=lambda: found.extend(together(*others)))
    first.start()
    time.sleep(0.1)
    with pytest.raises(NotJoined, match="but there is NNODES = 3"):
        join(replace(two, node_rank=1), 0.05, lambda line: None)
    assert together(replace(three, node_rank=1)) == [""]
    first.join()
    assert found == ["", ""]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nodes": 4}, "NNODES = 4, NGPU = 1"),
        ({"ranks_per_node": 8}, "NNODES = 3, NGPU = 8"),
        ({}, "there is NODE_RANK = 1, NNODES = 3"),
    ],
)
def test_a_machine_that_was_started_in_another_way_or_twice_is_not_joined(two, change, said):
    first = replace(two, nodes=3)
    second = replace(first, node_rank=1)
    *_, last = together(first, second, replace(second, **change), timeout=1.0)
    assert said in last


def test_who_is_missing_is_said_and_then_it_ends(two, tmp_path, capsys):
    lines: list[str] = []
    with pytest.raises(NotJoined, match=r"no launcher answers .* \(comm\.init_timeout_seconds\)"):
        join(replace(two, node_rank=1), 0.5, lines.append)
    assert len(lines) == 1
    assert Job(two, "nothing", [], tmp_path, saves=True, join_timeout=1).run() == FAILED
    said = capsys.readouterr().err
    assert "\ntorchtitan-flux: the ranks were not started: NODE_RANK 1 missing at" in said
