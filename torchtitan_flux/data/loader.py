"""Batches for one data rank, for ever, from a global position (contract 1).

torch's DataLoader over a map data set and a batch sampler: workers hold no state, and the one
number that a checkpoint needs is kept here.
"""

import atexit
import os
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Any, ClassVar, Generic, Protocol, TypedDict, TypeVar, runtime_checkable

import torch
from torch.utils.data import DataLoader
from typing_extensions import Unpack

from torchtitan_flux.data.batch import Batch, TrainingBatch, ValidationBatch, stack
from torchtitan_flux.data.samples import Replacement, TrainingSamples, ValidationSamples
from torchtitan_flux.lifetime import die_with_parent

B = TypeVar("B", bound=Batch)


class Workers(TypedDict, total=False):
    """How batches are prepared; torch's DataLoader has the same arguments and defaults.

    Without workers, a thread of this process prepares the next batch. `prefetch_factor` and
    `persistent_workers` are unused then.
    """

    num_workers: int
    pin_memory: bool
    prefetch_factor: int | None
    persistent_workers: bool


def positions_of(
    step: int,
    microbatch: int,
    rank: int,
    *,
    global_batch_size: int,
    local_batch_size: int,
    dp_world_size: int,
) -> range:
    """Positions of one microbatch of one data rank.

    Step s trains on [s*G, (s+1)*G). Every rank owns a contiguous part of it, and its microbatches
    are consecutive pieces of that part.
    """
    first = step * global_batch_size + rank * (global_batch_size // dp_world_size)
    first += microbatch * local_batch_size
    return range(first, first + local_batch_size)


def check_batch_sizes(global_batch_size: int, local_batch_size: int, dp_world_size: int) -> int:
    """Microbatches of a rank in a step; ValueError when the sizes do not fit."""
    if local_batch_size < 1:
        raise ValueError(f"training.local_batch_size must be at least 1, is {local_batch_size}")
    if global_batch_size < 1 or global_batch_size % (local_batch_size * dp_world_size):
        raise ValueError(
            f"training.global_batch_size {global_batch_size} is not a positive multiple of "
            f"training.local_batch_size {local_batch_size} x {dp_world_size} data ranks "
            f"= {local_batch_size * dp_world_size}"
        )
    return global_batch_size // (local_batch_size * dp_world_size)


class FluxDataLoader:
    """An endless iterator over the batches of one data rank.

    It is its own iterator: `iter()` goes on where the last batch was handed out, and
    `load_state_dict` moves it, in the midst of a run too; steps then count from there.

    Args:
        samples: map from position to sample.
        global_batch_size: samples of one step over all ranks and microbatches.
        local_batch_size: samples of one microbatch of one rank.
        dp_rank, dp_world_size: data rank, and number of data ranks. Context and tensor peers have
            the same rank and get equal batches.
        workers: see `Workers`.

    Raises:
        ValueError: the batch sizes do not fit; names the TOML keys.
    """

    def __init__(
        self,
        samples: TrainingSamples,
        global_batch_size: int,
        local_batch_size: int,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        **workers: Unpack[Workers],
    ):
        self.microbatches = check_batch_sizes(global_batch_size, local_batch_size, dp_world_size)
        """Batches of a step."""
        self.global_batch_size = global_batch_size
        self.samples = samples
        self.replaced: list[Replacement] = []
        """Items of the batches handed out that could not be read, in the order of positions."""
        positions = partial(
            positions_of,
            rank=dp_rank,
            global_batch_size=global_batch_size,
            local_batch_size=local_batch_size,
            dp_world_size=dp_world_size,
        )
        self._sampler = _PositionSampler(positions, self.microbatches)
        self._batches: _Batches[TrainingBatch] = _Batches(samples, self._sampler, **workers)

    @property
    def position(self) -> int:
        """Global position of the first step that was not handed out completely."""
        steps = self._sampler.handed_out // self.microbatches
        return self._sampler.origin + steps * self.global_batch_size

    def __iter__(self) -> "FluxDataLoader":
        return self

    def __next__(self) -> TrainingBatch:
        batch, replaced = next(self._batches)
        self.replaced += replaced
        self._sampler.handed_out += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """{"position": ...}: whole steps that were handed out, not what workers have prefetched."""
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at `state_dict["position"]`, also where the global batch size was another."""
        position = int(state_dict["position"])
        if position < 0:
            raise ValueError(f"position {position} of the checkpoint is negative")
        self._sampler.origin, self._sampler.handed_out = position, 0
        self._batches.restart()

    def close(self) -> None:
        """End workers and thread. The loader can be used again and goes on where it was."""
        self._batches.close()


class ValidationLoader:
    """The whole of a held-out set, dealt to data ranks; every `iter()` starts anew.

    Every rank gets the same number of batches, all of `batch_size` samples: what is missing at the
    end is filled up with repeats of weight zero. Arguments are those of `FluxDataLoader`.
    """

    def __init__(
        self,
        samples: ValidationSamples,
        batch_size: int,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        **workers: Unpack[Workers],
    ):
        if batch_size < 1:
            raise ValueError(f"validation.local_batch_size must be at least 1, is {batch_size}")
        if not len(samples):
            raise ValueError("validation.dataset: there is no item to validate on")
        self.samples = samples
        self.replaced: list[Replacement] = []
        """Items that could not be read, from all passes."""
        self._indices = [
            range(first + dp_rank * batch_size, first + (dp_rank + 1) * batch_size)
            for first in range(0, len(samples), batch_size * dp_world_size)
        ]
        self._batches: _Batches[ValidationBatch] = _Batches(samples, self._indices, **workers)

    def __len__(self) -> int:
        """Number of batches, the same on every rank."""
        return len(self._indices)

    def __iter__(self) -> Iterator[ValidationBatch]:
        self._batches.restart()
        for batch, replaced in self._batches:
            self.replaced += replaced
            yield batch

    def close(self) -> None:
        """End workers and thread."""
        self._batches.close()


class _PositionSampler:
    """Batch sampler: positions of one rank's microbatches after those handed out, without end."""

    def __init__(self, positions: Callable[[int, int], range], microbatches: int):
        self._positions = positions
        self._microbatches = microbatches
        self.origin = 0  # position that step 0 begins at: where a checkpoint was continued
        self.handed_out = 0  # microbatches since then

    def __iter__(self) -> Iterator[range]:
        origin = self.origin
        for number in count(self.handed_out):
            local = self._positions(*divmod(number, self._microbatches))
            yield range(origin + local.start, origin + local.stop)


@runtime_checkable
class _Samples(Protocol):
    replaced: list[Replacement]

    def __getitem__(self, index: int, /) -> Batch: ...


class _BatchSet:
    """What workers hold: samples by the batch, with the replacements that occurred in it."""

    def __init__(self, samples: _Samples):
        self._samples = samples

    def __getitems__(self, indices: Sequence[int]) -> tuple[Batch, list[Replacement]]:
        batch = stack([self._samples[index] for index in indices])
        replaced = list(self._samples.replaced)
        self._samples.replaced.clear()
        return batch, replaced


def _as_it_is(batch: Any) -> Any:
    return batch


def _init_worker(worker_id: int) -> None:
    # torchrun and the terminal signal the whole process group; the ranks still need their data to
    # finish the step and save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent()  # since nothing else would end them when their rank is killed
    torch.set_num_threads(1)


class _Prefetcher:
    """An iterator whose next element a thread makes while the caller is busy with this one.

    Torch computes, and PIL decodes, without Python's lock, so a thread is enough to hide most of
    the work. What the iterator raises is raised here in its turn, and again at every later call.
    """

    def __init__(self, iterator: Iterator):
        self._iterator = iterator  # used by the thread alone from now on
        self._process = os.getpid()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flux-data")
        self._next = self._thread.submit(next, iterator)

    @property
    def is_forked(self) -> bool:
        """The thread is in the process that this one was forked from."""
        return self._process != os.getpid()

    def __iter__(self) -> "_Prefetcher":
        return self

    def __next__(self) -> Any:
        element = self._next.result()
        self._next = self._thread.submit(next, self._iterator)
        return element

    def close(self) -> None:
        """End the thread, after the element that it is at."""
        if not self.is_forked:
            self._thread.shutdown(wait=True, cancel_futures=True)


class _Batches(Generic[B]):
    """A DataLoader and its running iterator, started on demand and ended together."""

    _open: ClassVar["weakref.WeakSet[_Batches]"] = weakref.WeakSet()

    def __init__(
        self, samples: _Samples, indices: Iterable[Sequence[int]], **workers: Unpack[Workers]
    ):
        if not workers.get("num_workers"):
            workers = {"pin_memory": workers.get("pin_memory", False)}
        self._arguments: dict[str, Any] = {
            **workers,
            "dataset": _BatchSet(samples),
            "batch_sampler": indices,
            "collate_fn": _as_it_is,
            "pin_memory": workers.get("pin_memory", False) and torch.cuda.is_available(),
            "worker_init_fn": _init_worker,
            # Without one, every iterator would draw a number from torch's global generator.
            "generator": torch.Generator(),
        }
        self._loader: DataLoader | None = None
        self._iterator: Iterator | None = None
        self._prefetcher: _Prefetcher | None = None

    def __iter__(self) -> "_Batches[B]":
        return self

    def __next__(self) -> tuple[B, list[Replacement]]:
        if self._prefetcher and self._prefetcher.is_forked:
            self.close()
        if self._iterator is None:
            if self._loader is None:
                self._loader = DataLoader(**self._arguments)
            self._iterator = iter(self._loader)
            if not self._loader.num_workers:
                self._iterator = self._prefetcher = _Prefetcher(self._iterator)
            self._end_at_exit()
        return next(self._iterator)

    def restart(self) -> None:
        """Begin the indices anew with the next batch."""
        self._end_thread()
        self._iterator = None
        if not self._arguments.get("persistent_workers"):
            self._loader = None  # it holds the iterator, which holds the workers

    def close(self) -> None:
        """End the workers: they go with the last reference to the iterator. End the thread."""
        self._end_thread()
        self._iterator = self._loader = None

    def _end_thread(self) -> None:
        if self._prefetcher:
            self._prefetcher.close()  # before another iterator uses the same samples
            self._prefetcher = None

    def _end_at_exit(self) -> None:
        # Since workers ignore SIGTERM, multiprocessing's own way of ending them at exit would wait
        # for ever. Exit functions run last in, first out: register again after every start of
        # workers, to come before those that torch registered for them.
        self._open.add(self)
        atexit.unregister(_close_all)
        atexit.register(_close_all)


def _close_all() -> None:
    for batches in list(_Batches._open):
        batches.close()
