"""Machines that meet, on loopback: each a thread with settings of its own."""

import socket
import threading
import time
from dataclasses import replace

import pytest

from torchtitan_flux.launching import joining
from torchtitan_flux.launching.job import Job
from torchtitan_flux.launching.joining import NotJoined, join
from torchtitan_flux.launching.rank import LAUNCHER
from torchtitan_flux.launching.settings import Settings
from torchtitan_flux.launching.verdict import FAILED
from torchtitan_flux.training.heartbeat import FOLDER


@pytest.fixture
def two(monkeypatch) -> Settings:
    """Settings of one of two machines that number themselves."""
    monkeypatch.setattr(joining, "BEAT", 0.02)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return Settings(nodes=2, endpoint=f"localhost:{free.getsockname()[1]}")


def together(*machines: Settings, timeout: float = 10.0, apart: float = 0.0) -> list[str]:
    """How each of them fared: "" where it joined, else what NotJoined said."""
    said = ["?"] * len(machines)
    stores = []

    def one(index: int) -> None:
        time.sleep(index * apart)
        try:
            stores.append(join(machines[index], timeout, lambda line: None))
            said[index] = ""
        except NotJoined as error:
            said[index] = str(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(machines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (None, None)])
def test_machines_meet_in_any_order(two, numbers):
    machines = [replace(two, node_rank=number) for number in numbers]
    assert together(*machines, apart=0.2) == ["", ""]


@pytest.mark.parametrize(
    ("number", "state"),
    [
        (0, "1 of 2 machines have joined at {} (NODE_RANK 1 missing)"),
        (None, "1 of 2 machines have joined at {}"),
        (1, "no launcher answers at {} ([Errno 111] Connection refused), where 2 machines meet"),
    ],
)
def test_who_is_missing_is_said_again_and_again_and_then_it_ends(two, number, state):
    lines: list[str] = []
    state = state.format(two.endpoint)
    with pytest.raises(NotJoined) as error:
        join(replace(two, node_rank=number), 0.5, lines.append, interval=0.2)
    assert [line.split("; ")[0] for line in lines] == [state] * 2
    assert "s more at most" in lines[0]
    assert str(error.value).startswith(f"{state}; waited ")
    assert "comm.init_timeout_seconds" in str(error.value)


def test_a_machine_that_went_away_is_not_counted(two, monkeypatch):
    """The first of three stays, the second leaves, a third comes and another after it."""
    monkeypatch.setattr(joining, "ALIVE", 0.1)
    three = replace(two, nodes=3)
    first = threading.Thread(target=lambda: together(three, timeout=1.5))
    first.start()
    time.sleep(0.1)
    for _ in range(3):
        with pytest.raises(NotJoined, match="2 of 3 machines have joined"):
            join(three, 0.2, lambda line: None)
        time.sleep(0.15)
    first.join()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": 3}, "NNODES = 2 here, and 3 on another machine"),
        ({"ranks_per_node": 8}, "NGPU = 1 here, and 8 on another machine"),
    ],
)
def test_machines_that_disagree_say_so_at_once(two, change, message):
    said = together(two, replace(two, **change), apart=0.1)
    assert said[0].startswith(message)
    assert "all need the same" in said[1]


def test_a_number_given_twice_is_noticed(two):
    three = replace(two, nodes=3)
    machines = [replace(three, node_rank=number) for number in (0, 1, 1)]
    said = together(*machines, timeout=1.0, apart=0.1)
    assert "NODE_RANK 2 missing" in said[0]
    assert said[1] == "NODE_RANK = 1 was given to two machines"


def test_one_that_comes_when_all_have_met_is_told(two):
    said = together(two, two, two, apart=0.3)
    assert said[:2] == ["", ""]
    assert "have met" in said[2]


def test_the_launcher_says_so_and_ends_with_status_1(two, tmp_path, monkeypatch, capsys):
    for name in (FOLDER, LAUNCHER, "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "")  # put back afterwards
    first = replace(two, node_rank=0)
    assert Job(first, "nothing", [], tmp_path, saves=True, join_timeout=1).run() == FAILED
    said = capsys.readouterr().err
    assert said.startswith("torchtitan-flux: the ranks were not started: 1 of 2 machines")
    assert "NODE_RANK 1 missing" in said
