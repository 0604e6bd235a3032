"""Ranks that work on the same samples (context, tensor and pipeline) share the encoders' work."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def shard_rows(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """The rows [share, …] that this rank encodes, of those that all ranks of the group have.

    Every rank takes equally many, since sharded encoders communicate in each call; where the rows
    do not divide, the last are taken several times. None: a rank with samples of its own.
    """
    if group is None:
        return rows
    share = -(-len(rows) // group.size())
    first = group.rank() * share
    return rows[torch.arange(first, first + share).clamp(max=len(rows) - 1)]


def all_gather_rows(encoded: Tensor, count: int, group: ProcessGroup | None) -> Tensor:
    """What all ranks made of their rows, in the order of the `count` rows."""
    if group is None:
        return encoded
    parts = [torch.empty_like(encoded) for _ in range(group.size())]
    dist.all_gather(parts, encoded.contiguous(), group=group)
    return torch.cat(parts)[:count]
