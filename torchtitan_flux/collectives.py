"""Objects and rows exchanged by ranks; a process that joined none is one rank alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)  # 48 GB at 7 MB/s


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The value of every rank."""
    if not dist.is_initialized():
        return [value]
    found = [value] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def from_rank_0(find: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What rank 0 finds, on every rank; so is an OSError that it raises."""
    if not dist.is_initialized():
        return find()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = find()
        except OSError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0, group=group)
    if box[1] is not None:
        raise OSError(box[1])
    return box[0]


def own_share(of_all: list[T]) -> list[T]:
    """Every n-th, of n ranks."""
    if not dist.is_initialized():
        return of_all
    return of_all[dist.get_rank() :: dist.get_world_size()]


@contextmanager
def patient_group() -> Iterator[dist.ProcessGroup | None]:
    """Ranks wait in it for one that reads or writes 12B, longer than any step may take."""
    if not dist.is_initialized():
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    yield group
    dist.destroy_process_group(group)


def shard_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows [share, …] that this rank encodes, of those that all ranks of the group have, since
    they work on the same samples (context, tensor and pipeline).

    Every rank takes equally many, since sharded encoders communicate in each call; where the rows
    do not divide, the last are taken several times. None: a rank with samples of its own.
    """
    if group is None:
        return rows
    share = -(-len(rows) // group.size())
    first = group.rank() * share
    return rows[torch.arange(first, first + share).clamp(max=len(rows) - 1)]


def all_gather_rows(encoded: Tensor, count: int, group: dist.ProcessGroup | None) -> Tensor:
    """What all ranks made of their rows, in the order of the `count` rows."""
    if group is None:
        return encoded
    parts = [torch.empty_like(encoded) for _ in range(group.size())]
    dist.all_gather(parts, encoded.contiguous(), group=group)
    return torch.cat(parts)[:count]
