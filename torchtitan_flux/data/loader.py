"""Batches for one data rank, for ever, from a global position (contract 1).

Behind torchdata's StatefulDataLoader: a map data set and a batch sampler. Its workers hold no
state and its snapshots are off; the one number that a checkpoint needs is kept here.
"""

import atexit
import signal
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from torchtitan_flux.data.prefetch import Ahead
from torchtitan_flux.data.samples import Replacement, TrainingSamples, ValidationSamples
from torchtitan_flux.lifetime import die_with_parent

Batch = dict[str, Tensor]
"""Samples stacked along a new first axis."""


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
        num_workers: processes that prepare batches; with 0 a thread of this one prepares the next.
        pin_memory: hand out batches in pinned memory, where there is a GPU.
        prefetch_factor: batches that each worker prepares ahead; 2 when None. Unused without
            workers.
        persistent_workers: keep the workers when the position is moved. Unused without workers.

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
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
    ):
        self.microbatches = check_batch_sizes(global_batch_size, local_batch_size, dp_world_size)
        """Batches of a step."""
        self.global_batch_size = global_batch_size
        self.samples = samples
        self.replaced: list[Replacement] = []
        """Items of the batches handed out that could not be read, in the order of positions."""
        self._step = 0
        self._microbatch = 0  # handed out of the current step
        positions = partial(
            positions_of,
            rank=dp_rank,
            global_batch_size=global_batch_size,
            local_batch_size=local_batch_size,
            dp_world_size=dp_world_size,
        )
        self._sampler = _PositionSampler(positions, self.microbatches)
        self._batches = _WorkerBatches(
            samples,
            self._sampler,
            num_workers=num_workers,
            pin_memory=pin_memory,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
        )

    @property
    def position(self) -> int:
        """Global position of the first step that was not handed out completely."""
        return self._sampler.origin + self._step * self.global_batch_size

    def __iter__(self) -> "FluxDataLoader":
        return self

    def __next__(self) -> Batch:
        batch, replaced = next(self._batches)
        self.replaced += replaced
        self._microbatch += 1
        if self._microbatch == self.microbatches:
            self._step, self._microbatch = self._step + 1, 0
        self._sampler.start = (self._step, self._microbatch)  # for whoever iterates next
        return batch

    def state_dict(self) -> dict[str, int]:
        """{"position": ...}: whole steps that were handed out, not what workers have prefetched."""
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at `state_dict["position"]`, also where the global batch size was another."""
        position = int(state_dict["position"])
        if position < 0:
            raise ValueError(f"position {position} of the checkpoint is negative")
        self._step, self._microbatch = 0, 0
        self._sampler.origin = position
        self._sampler.start = (0, 0)
        self._batches.restart()

    def close(self) -> None:
        """End workers and thread. The loader can be used again and goes on where it was."""
        self._batches.close()


class ValidationLoader:
    """The whole of a held-out set, dealt to data ranks; every `iter()` starts anew.

    Every rank gets the same number of batches, all of `batch_size` samples: what is missing at the
    end is filled up with repeats of weight zero.

    Args:
        samples: map from index to sample.
        batch_size: samples of one batch of one rank.
        dp_rank, dp_world_size: data rank, and number of data ranks.
        num_workers, pin_memory, prefetch_factor, persistent_workers: as in `FluxDataLoader`.
    """

    def __init__(
        self,
        samples: ValidationSamples,
        batch_size: int,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
    ):
        self.samples = samples
        if batch_size < 1:
            raise ValueError(f"validation.local_batch_size must be at least 1, is {batch_size}")
        if not len(samples):
            raise ValueError("validation.dataset: there is no item to validate on")
        self.replaced: list[Replacement] = []
        """Items that could not be read, from all passes."""
        self._dealt = [
            range(first + dp_rank * batch_size, first + (dp_rank + 1) * batch_size)
            for first in range(0, len(samples), batch_size * dp_world_size)
        ]
        self._batches = _WorkerBatches(
            _Padded(samples),
            self._dealt,
            num_workers=num_workers,
            pin_memory=pin_memory,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
        )

    def __len__(self) -> int:
        """Number of batches, the same on every rank."""
        return len(self._dealt)

    def __iter__(self) -> Iterator[Batch]:
        self._batches.restart()
        for batch, replaced in self._batches:
            self.replaced += replaced
            yield batch

    def close(self) -> None:
        """End workers and thread."""
        self._batches.close()


class _PositionSampler:
    """Batch sampler: the positions of one rank's microbatches, from a place on, without end."""

    def __init__(self, positions: Callable[[int, int], range], microbatches: int):
        self._positions = positions
        self._microbatches = microbatches
        self.origin = 0  # position that step 0 begins at: where a checkpoint was continued
        self.start: tuple[int, int] = (0, 0)  # step, microbatch

    def __iter__(self) -> Iterator[range]:
        step, microbatch = self.start
        while True:
            local = self._positions(step, microbatch)
            yield range(self.origin + local.start, self.origin + local.stop)
            microbatch += 1
            if microbatch == self._microbatches:
                step, microbatch = step + 1, 0


@runtime_checkable
class _Samples(Protocol):
    replaced: list[Replacement]

    def __getitem__(self, index: int, /) -> Batch: ...


class _Padded:
    """Validation samples; an index past the end is a repeat of weight zero."""

    def __init__(self, samples: ValidationSamples):
        self._samples = samples
        self.replaced = samples.replaced

    def __getitem__(self, index: int) -> Batch:
        sample = self._samples[index % len(self._samples)]
        if index >= len(self._samples):
            sample["weight"] = torch.tensor(0.0)
        return sample


class _BatchSet:
    """What workers hold: samples by the batch, with the replacements that occurred in it."""

    def __init__(self, samples: _Samples):
        self._samples = samples

    def __getitems__(self, indices: Sequence[int]) -> tuple[list[Batch], list[Replacement]]:
        batch = [self._samples[index] for index in indices]
        replaced = list(self._samples.replaced)
        self._samples.replaced.clear()
        return batch, replaced


def _collate(fetched: tuple[list[Batch], list[Replacement]]) -> tuple[Batch, list[Replacement]]:
    samples, replaced = fetched
    batch = {key: _stack([sample[key] for sample in samples]) for key in samples[0]}
    return batch, replaced


def _stack(tensors: list[Tensor]) -> Tensor:
    """`torch.stack`; a worker's goes straight to the memory that it shares with the trainer."""
    first = tensors[0]
    if get_worker_info() is None:
        return torch.stack(tensors)
    size = len(tensors) * first.numel() * first.element_size()
    shared = torch.UntypedStorage._new_shared(size)
    shape = (len(tensors), *first.shape)
    out = torch.empty(0, dtype=first.dtype).set_(shared, 0, shape)  # pyright: ignore[reportCallIssue]
    return torch.stack(tensors, out=out)


def _init_worker(worker_id: int) -> None:
    # torchrun and the terminal signal the whole process group; the ranks still need their data to
    # finish the step and save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent()  # since nothing else would end them when their rank is killed
    torch.set_num_threads(1)


class _WorkerBatches:
    """A StatefulDataLoader and its running iterator, started on demand and ended together.

    Without workers, a thread prepares the next batch.
    """

    _open: ClassVar["weakref.WeakSet[_WorkerBatches]"] = weakref.WeakSet()

    def __init__(
        self,
        samples: _Samples,
        batch_sampler: Any,
        *,
        num_workers: int,
        pin_memory: bool,
        prefetch_factor: int | None,
        persistent_workers: bool,
    ):
        self._arguments: dict[str, Any] = {
            "dataset": _BatchSet(samples),
            "batch_sampler": batch_sampler,
            "collate_fn": _collate,
            "num_workers": num_workers,
            "pin_memory": pin_memory and torch.cuda.is_available(),
            "worker_init_fn": _init_worker,
            # Without one, every iterator would draw a number from torch's global generator.
            "generator": torch.Generator(),
            "snapshot_every_n_steps": None,
        }
        if num_workers:
            self._arguments["prefetch_factor"] = prefetch_factor
            self._arguments["persistent_workers"] = persistent_workers
        self._loader: StatefulDataLoader | None = None
        self._iterator: Iterator | None = None
        self._thread: Ahead | None = None

    def __iter__(self) -> "_WorkerBatches":
        return self

    def __next__(self) -> tuple[Batch, list[Replacement]]:
        if self._thread and self._thread.lost:
            self.close()
        if self._iterator is None:
            if self._loader is None:
                with warnings.catch_warnings():
                    # torchdata 0.11 calls what torch 2.13 deprecates; nobody here can change it.
                    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
                    self._loader = StatefulDataLoader(**self._arguments)
            self._iterator = iter(self._loader)
            if not self._arguments["num_workers"]:
                self._iterator = self._thread = Ahead(self._iterator)
            self._end_at_exit()
        return next(self._iterator)

    def restart(self) -> None:
        """Begin the batch sampler anew with the next batch."""
        self._end_thread()
        self._iterator = None
        if not self._arguments.get("persistent_workers"):
            self._loader = None  # it holds the iterator, which holds the workers

    def close(self) -> None:
        """End the workers: they go with the last reference to the iterator. End the thread."""
        self._end_thread()
        self._iterator = self._loader = None

    def _end_thread(self) -> None:
        if self._thread:
            self._thread.close()  # before another iterator uses the same samples
            self._thread = None

    def _end_at_exit(self) -> None:
        # Since workers ignore SIGTERM, multiprocessing's own way of ending them at exit would wait
        # for ever. Exit functions run last in, first out: register again after every start of
        # workers, to come before those that torch registered for them.
        self._open.add(self)
        atexit.unregister(_close_all)
        atexit.register(_close_all)


def _close_all() -> None:
    for batches in list(_WorkerBatches._open):
        batches.close()
