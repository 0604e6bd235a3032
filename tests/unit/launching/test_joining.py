"""Machines that meet, on loopback: each a thread with settings of its own."""

import socket
import threading
import time
from dataclasses import replace

import pytest

from torchtitan_flux.launching import joining
from torchtitan_flux.launching.job import FAILED, Job
from torchtitan_flux.launching.joining import NotJoined, join
from torchtitan_flux.launching.settings import Settings


@pytest.fixture
def two(monkeypatch) -> Settings:
    """Settings of one of two machines that number themselves."""
    monkeypatch.setattr(joining, "PERIOD", 0.02)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return Settings(nodes=2, endpoint=f"localhost:{free.getsockname()[1]}")


def together(*machines: Settings, timeout: float = 10.0, apart: float = 0.0) -> list[int | str]:
    """How each of them fared: its number, or what NotJoined said."""
    found: list[int | str] = ["?"] * len(machines)
    stores = []

    def one(index: int) -> None:
        time.sleep(index * apart)
        try:
            store, found[index] = join(machines[index], timeout, lambda line: None)
            stores.append(store)
        except NotJoined as error:
            found[index] = str(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(machines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (None, None)])
def test_machines_meet_in_any_order(two, numbers):
    machines = [replace(two, node_rank=number) for number in numbers]
    assert together(*machines, apart=0.2) == [0, 1] if numbers[0] is None else list(numbers)


@pytest.mark.parametrize(
    ("number", "state"),
    [
        (0, "1 of 2 machines have joined at {} (NODE_RANK 1 missing)"),
        (None, "1 of 2 machines have joined at {}"),
        (1, "no launcher answers at {} ([Errno 111] Connection refused)"),
    ],
)
def test_who_is_missing_is_said_again_and_again_and_then_it_ends(two, number, state):
    lines: list[str] = []
    state = state.format(two.endpoint)
    with pytest.raises(NotJoined, match=r"comm\.init_timeout_seconds") as error:
        join(replace(two, node_rank=number), 0.5, lines.append, interval=0.2)
    assert [line.split("; ")[0] for line in lines] == [state] * 2
    assert "s more at most" in lines[0]
    assert str(error.value).startswith(f"{state}; waited ")


def test_a_machine_that_went_away_is_not_counted(two):
    """The first of three stays, the second leaves, a third comes and another after it."""
    three = replace(two, nodes=3)
    first = threading.Thread(target=lambda: together(three, timeout=2.0))
    first.start()
    time.sleep(0.1)
    for _ in range(3):
        with pytest.raises(NotJoined, match="2 of 3 machines have joined"):
            join(three, 0.2, lambda line: None)
    first.join()


@pytest.mark.parametrize(
    ("machines", "found"),
    [
        (({}, {"nodes": 3}), ("NNODES = 2 here, and 3 on another", "NNODES = 3 here")),
        (({}, {"ranks_per_node": 8}), ("NGPU = 1 here, and 8 on another", "all need the same")),
        (({"nodes": 3, "node_rank": 0}, *[{"nodes": 3, "node_rank": 1}] * 2),
         ("NODE_RANK 2 missing", "waited", "NODE_RANK = 1 joined at")),
        (({}, {}, {}), (0, 1, "2 machines joined at")),
    ],
)  # fmt: skip
def test_machines_that_cannot_meet_say_so(two, machines, found):
    answers = together(*(replace(two, **change) for change in machines), timeout=1.0, apart=0.3)
    for answer, expected in zip(answers, found, strict=True):
        assert answer == expected or str(expected) in str(answer)


def test_the_launcher_says_so_and_ends_with_status_1(two, tmp_path, capsys):
    first = replace(two, node_rank=0)
    assert Job(first, "nothing", [], tmp_path, saves=True, join_timeout=1).run() == FAILED
    said = capsys.readouterr().err
    assert said.startswith("torchtitan-flux: the ranks were not started: 1 of 2 machines")
    assert "NODE_RANK 1 missing" in said
