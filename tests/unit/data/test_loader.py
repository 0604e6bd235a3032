import gc
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from data_files import tensors
from torch.utils.data import get_worker_info

from torchtitan_flux.data.batch import Batch
from torchtitan_flux.data.loader import FluxDataLoader, ValidationLoader
from torchtitan_flux.data.samples import TrainingSamples

G = 12


@pytest.fixture
def make_loader(make_samples):
    loaders = []

    def make(*args, samples=None, **kwargs) -> FluxDataLoader:
        loaders.append(FluxDataLoader(samples or make_samples(length=97), *args, **kwargs))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


Tensors = dict[str, torch.Tensor]


def take(loader, batches: int) -> list[Batch]:
    return [next(loader) for _ in range(batches)]


def joined(batches: list[Batch]) -> Tensors:
    """All tensors of all batches, by the name of their field."""
    parts = [tensors(batch) for batch in batches]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def positions(batches: list[Batch]) -> list[int]:
    return joined(batches)["position"].tolist()


def assert_equal(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def run_of(make_loader, steps: int, local: int, world: int, start: int = 0, **kwargs) -> Tensors:
    """All samples of some steps in the order of positions, whatever the ranks are."""
    loaders = [make_loader(G, local, rank, world, **kwargs) for rank in range(world)]
    for loader in loaders:
        loader.load_state_dict({"position": start})
    batches = []
    for _ in range(steps):
        for loader in loaders:
            batches += take(loader, loader.microbatches)
    return joined(batches)


@pytest.mark.parametrize(("world", "local"), [(1, 3), (2, 6), (2, 2), (4, 3), (4, 1)])
def test_same_data_on_any_number_of_ranks_and_with_accumulation(make_loader, world, local):
    reference = run_of(make_loader, steps=3, local=12, world=1)
    assert reference["position"].tolist() == list(range(3 * G))
    assert_equal(run_of(make_loader, steps=3, local=local, world=world), reference)


def test_workers_change_nothing_and_context_peers_get_equal_batches(make_loader):
    # Context and tensor peers have the same data rank, but loaders (and workers) of their own.
    first, *others = (
        joined(take(make_loader(G, 3, 1, 2, num_workers=workers), 6)) for workers in (0, 0, 1, 2)
    )
    for one in others:
        assert_equal(one, first)


@pytest.mark.parametrize(
    ("num_workers", "world", "local"), [(0, 1, 12), (0, 2, 3), (0, 4, 1), (2, 2, 3), (2, 1, 4)]
)
def test_resuming_continues_exactly_on_any_number_of_ranks(make_loader, num_workers, world, local):
    reference = run_of(make_loader, steps=5, local=12, world=1)
    # Workers have prefetched beyond what is handed out when the state is taken.
    first = make_loader(
        G, 3, 0, 2, num_workers=num_workers, prefetch_factor=4 if num_workers else None
    )
    take(first, 2 * first.microbatches)
    state = first.state_dict()
    assert state == {"position": 2 * G}
    rest = run_of(
        make_loader, 3, local, world, start=state["position"], num_workers=num_workers and 1
    )
    assert_equal(rest, {key: value[2 * G :] for key, value in reference.items()})


def test_state_counts_whole_steps_that_were_handed_out(make_loader):
    loader = make_loader(G, 2, 0, 2, num_workers=1, prefetch_factor=5)
    seen = []
    for _ in range(7):
        next(loader)
        seen.append(loader.state_dict()["position"])
    assert seen == [0, 0, 12, 12, 12, 24, 24]


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}]
)
def test_position_can_be_moved_in_the_midst_of_a_run(make_loader, options):
    loader = make_loader(G, 4, **options)
    take(loader, 4)
    loader.load_state_dict({"position": 5 * G})
    assert positions(take(loader, 3)) == list(range(5 * G, 6 * G))
    assert loader.position == 6 * G


@pytest.mark.parametrize("num_workers", [0, 1])
def test_closing_and_iterating_again_go_on_in_place(make_loader, num_workers):
    loader = make_loader(G, 4, num_workers=num_workers)
    seen = []
    for batch in loader:
        seen += batch.position.tolist()
        break
    loader.close()
    for batch in loader:
        seen += batch.position.tolist()
        if len(seen) >= 2 * G:
            break
    assert seen == list(range(2 * G))


def test_torch_s_random_numbers_are_left_alone(make_loader):
    before = torch.get_rng_state()
    take(make_loader(G, 4, num_workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_sizes_are_validated(make_loader):
    for local, world in ((5, 1), (6, 4), (24, 1)):
        with pytest.raises(ValueError, match=r"training\.global_batch_size = 12 "):
            make_loader(G, local, 0, world)


def test_a_run_goes_on_with_another_global_batch_size(make_loader):
    """No position is left out and none comes twice, though 2 G is no multiple of the new size."""
    loader = make_loader(15, 5)
    loader.load_state_dict({"position": 2 * G})
    seen = positions(take(loader, 6))
    assert seen == list(range(2 * G, 2 * G + 30))
    assert loader.state_dict() == {"position": 2 * G + 30}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_replacements_arrive_with_their_batches(
    make_loader, make_samples, make_source, num_workers
):
    source = make_source(10, unreadable=frozenset({2, 3}))
    loader = make_loader(G, 4, samples=make_samples(source=source), num_workers=num_workers)
    take(loader, 6)
    samples = make_samples(source=source)
    expected = [one for p in range(2 * G) for one in samples[p].replaced]
    assert len(expected) >= 4
    assert loader.replaced == expected


def data_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("flux-data")]


class Recorded(TrainingSamples):
    """Samples that record which threads made them, and when the eighth is made."""

    def __init__(self, **options):
        super().__init__(**options)
        self.threads: set[int] = set()
        self.eighth = threading.Event()

    def __getitem__(self, position):
        self.threads.add(threading.get_ident())
        if position == 7:
            self.eighth.set()
        return super().__getitem__(position)


@pytest.mark.parametrize("how", ["close", "del", "load_state_dict"])
def test_without_workers_a_thread_prepares_the_next_batch(make_samples, how):
    samples = make_samples(cls=Recorded)
    loader = FluxDataLoader(samples, G, 4)
    assert not data_threads()
    next(loader)
    assert samples.eighth.wait(60), "nobody asks for the second batch, and it is made"
    assert samples.threads == {thread.ident for thread in data_threads()}
    assert next(loader).position.tolist() == [4, 5, 6, 7]
    if how == "close":
        loader.close()
        assert not data_threads()
        assert next(loader).position.tolist() == [8, 9, 10, 11]
    if how == "load_state_dict":
        loader.load_state_dict({"position": 0})
    else:
        del loader
        gc.collect()
    for thread in data_threads():
        thread.join(60)
    assert not data_threads()


def test_what_a_sample_raises_comes_with_its_batch(make_loader, make_samples):
    class Breaks(TrainingSamples):
        def __getitem__(self, position):
            if position == 5:
                raise ZeroDivisionError("position 5")
            return super().__getitem__(position)

    loader = make_loader(G, 4, samples=make_samples(cls=Breaks))
    assert next(loader).position.tolist() == [0, 1, 2, 3]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="position 5"):
            next(loader)
    assert loader.position == 0


class InWorker(TrainingSamples):
    """Samples of one thread, whose position is the process that made them."""

    def __getitem__(self, position):
        assert get_worker_info() is not None
        assert torch.get_num_threads() == 1
        return replace(super().__getitem__(position), position=torch.tensor(os.getpid()))


def test_workers_ignore_signals_and_use_one_thread(make_loader, make_samples):
    loader = make_loader(G, 4, samples=make_samples(cls=InWorker), num_workers=1)
    pid = int(next(loader).position[0])
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    for _ in range(6):  # more than was prefetched
        assert next(loader).position[0] == pid


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("how", ["close", "del"])
def test_workers_end_with_the_loader(make_samples, how):
    loader = FluxDataLoader(make_samples(cls=InWorker), G, 4, num_workers=1)
    pid = int(next(loader).position[0])
    assert is_running(pid)
    if how == "close":
        loader.close()
    else:
        del loader
        gc.collect()
    assert not is_running(pid)


EXIT_WITH_WORKERS = """
import multiprocessing, sys
sys.path[:0] = [{tests!r}]
from conftest import *
from torchtitan_flux.data.loader import FluxDataLoader

class Breaks(TrainingSamples):
    def __getitem__(self, position):
        assert position < 16
        return super().__getitem__(position)

samples = Breaks(**COMMON, source=GraySource(7), time_density=TimeDensity())
loader = FluxDataLoader(samples, 4, 2, num_workers=1)
import atexit
# runs after what is registered from here on, and before multiprocessing's own
atexit.register(lambda: print(multiprocessing.active_children(), flush=True))
next(loader)
assert multiprocessing.active_children()
if {breaks}:
    list(loader)
"""


@pytest.mark.parametrize("breaks", [False, True])
def test_interpreter_exits_with_workers(breaks):
    """They ignore SIGTERM, by which multiprocessing would end them: it finds none.

    A traceback refers to torch's iterator, so that they must be ended whatever refers to it.
    """
    code = EXIT_WITH_WORKERS.format(tests=os.path.dirname(__file__), breaks=breaks)
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,  # it would wait for ever
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert result.stdout.split() == ["[]"]
    assert ("AssertionError" in result.stderr) == breaks
    assert result.returncode == breaks


@pytest.mark.parametrize(
    ("length", "batch", "world", "num_workers"),
    [(12, 3, 2, 0), (13, 3, 2, 0), (13, 3, 2, 1), (5, 4, 3, 0), (1, 4, 2, 0)],
)
def test_validation_set_is_dealt_out_once(make_validation, length, batch, world, num_workers):
    samples = make_validation(length)
    per_rank = []
    for rank in range(world):
        loader = ValidationLoader(samples, batch, rank, world, num_workers=num_workers)
        per_rank.append(list(loader))
        assert len(per_rank[-1]) == len(loader)
        again = list(loader)
        assert_equal(joined(again), joined(per_rank[-1]))
    assert len({len(batches) for batches in per_rank}) == 1
    everything = joined([b for batches in per_rank for b in batches])
    assert everything["weight"].sum() == length
    assert all(len(b.position) == batch for batches in per_rank for b in batches)
    counted = everything["position"][everything["weight"] == 1]
    assert sorted(counted.tolist()) == list(range(length))
    for i, index in enumerate(everything["position"]):  # repeats are real samples
        assert torch.equal(everything["noise"][i], samples[int(index)].noise)


def test_validation_loader_lists_unreadable_items(make_validation, make_source):
    loader = ValidationLoader(make_validation(source=make_source(5, frozenset({1}))), 2)
    weights = joined(list(loader))["weight"]
    assert weights.tolist() == [1, 0, 1, 1, 1, 0]
    assert [(r.position, r.item_id) for r in loader.replaced] == [(1, "grays/1")]
