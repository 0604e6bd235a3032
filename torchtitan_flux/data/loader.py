"""Batches for one data rank, for ever, from a global position (contract 1).

torch's DataLoader over a map data set and a batch sampler: workers hold no state, and the one
number that a checkpoint needs is kept here.
"""

import atexit
import signal
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader

from torchtitan_flux.data.batch import Batch, Replacement, TrainingBatch, ValidationBatch, stack
from torchtitan_flux.data.samples import TrainingSamples, ValidationSamples
from torchtitan_flux.lifetime import die_with_parent

B = TypeVar("B", bound=Batch)


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
        workers: torch's DataLoader's; without `num_workers`, all but `pin_memory` are unused.

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
        **workers: Any,
    ):
        self.microbatches, rest = divmod(global_batch_size, local_batch_size * dp_world_size)
        """Batches of a step."""
        if rest or not self.microbatches:
            raise ValueError(
                f"training.global_batch_size = {global_batch_size} is not a multiple of "
                f"training.local_batch_size = {local_batch_size} times {dp_world_size} data ranks"
            )
        self.global_batch_size = global_batch_size
        self.samples = samples
        self.replaced: list[Replacement] = []
        """Items of the batches handed out that could not be read, in the order of positions."""
        self._sampler = _PositionSampler(
            global_batch_size, local_batch_size, dp_rank, dp_world_size
        )
        self._batches: _Batches[TrainingBatch] = _Batches(samples, self._sampler, **workers)

    @property
    def position(self) -> int:
        """Global position of the first step that was not handed out completely."""
        steps = self._sampler.handed_out // self.microbatches
        return self._sampler.origin + steps * self.global_batch_size

    def __iter__(self) -> "FluxDataLoader":
        return self

    def __next__(self) -> TrainingBatch:
        batch = next(self._batches)
        self.replaced += batch.replaced
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
        **workers: Any,
    ):
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
        for batch in self._batches:
            self.replaced += batch.replaced
            yield batch

    def close(self) -> None:
        """End workers and thread."""
        self._batches.close()


class _PositionSampler:
    """Batch sampler: positions of one rank's microbatches after those handed out, without end.

    Step s trains on [s*G, (s+1)*G). Every rank owns a contiguous part of it, and its microbatches
    are consecutive pieces of that part.
    """

    def __init__(self, global_batch_size: int, local_batch_size: int, rank: int, world_size: int):
        self._global, self._local = global_batch_size, local_batch_size
        self._microbatches = global_batch_size // (local_batch_size * world_size)
        self._first = rank * (global_batch_size // world_size)
        self.origin = 0  # position that step 0 begins at: where a checkpoint was continued
        self.handed_out = 0  # microbatches since then

    def __iter__(self) -> Iterator[range]:
        origin = self.origin
        for number in count(self.handed_out):
            step, microbatch = divmod(number, self._microbatches)
            first = origin + step * self._global + self._first + microbatch * self._local
            yield range(first, first + self._local)


def _init_worker(worker_id: int) -> None:
    # torchrun and the terminal signal the whole process group; the ranks still need their data to
    # finish the step and save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent()  # since nothing else would end them when their rank is killed
    torch.set_num_threads(1)


class _Batches(Generic[B]):
    """An iterator over a DataLoader that starts workers on demand, and ends them.

    Without workers a thread makes the next batch while the caller is busy with this one: torch
    computes, and PIL decodes, without Python's lock. What the iterator raises there is raised here
    in its turn, and again at every later call.
    """

    def __init__(
        self,
        samples: TrainingSamples | ValidationSamples,
        indices: Iterable[Sequence[int]],
        **workers: Any,
    ):
        pin = workers.get("pin_memory", False) and torch.cuda.is_available()
        self._arguments: dict[str, Any] = {
            **(workers if workers.get("num_workers") else {}),
            "dataset": samples,
            "batch_sampler": indices,
            "collate_fn": stack,
            "pin_memory": pin,
            "worker_init_fn": _init_worker,
            # Without one, every iterator would draw a number from torch's global generator.
            "generator": torch.Generator(),
        }
        self._loader: DataLoader | None = None
        self._iterator: Any = None
        self._thread: ThreadPoolExecutor | None = None
        self._next: Future | None = None
        self._end_workers: weakref.finalize | None = None

    def __iter__(self) -> "_Batches[B]":
        return self

    def __next__(self) -> B:
        iterator = self._start() if self._iterator is None else self._iterator
        if self._thread is None or self._next is None:
            return next(iterator)
        batch = self._next.result()
        self._next = self._thread.submit(next, iterator)
        return batch

    def _start(self) -> Any:
        begins = self._loader is None
        if self._loader is None:
            self._loader = DataLoader(**self._arguments)
        iterator: Any = iter(self._loader)
        self._iterator = iterator
        if not self._loader.num_workers:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="flux-data")
            self._next = self._thread.submit(next, iterator)
        elif begins:
            # Since workers ignore SIGTERM, multiprocessing's own way of ending them at exit would
            # wait for ever. Exit functions run last in, first out: this one before all others.
            self._end_workers = weakref.finalize(self, iterator._shutdown_workers)
            atexit.register(self._end_workers)
        return iterator

    def restart(self) -> None:
        """Begin the indices anew with the next batch."""
        if not self._arguments.get("persistent_workers"):
            return self.close()
        self._iterator = None

    def close(self) -> None:
        """End the workers, or the thread after the batch that it is at."""
        if self._thread:
            self._thread.shutdown(wait=True, cancel_futures=True)
        if self._end_workers:
            self._end_workers()
            atexit.unregister(self._end_workers)
        self._iterator = self._loader = self._thread = self._next = self._end_workers = None
