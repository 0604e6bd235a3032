"""Ranks that work on the same samples (context, tensor and pipeline) share the encoders' work."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Peers:
    """Rows of a batch, shared out to the ranks that all need them (None: every rank has its own).

    Every peer encodes equally many, since sharded encoders communicate in each call; where the
    rows do not divide, the last are encoded several times.
    """

    def __init__(self, group: ProcessGroup | None):
        self.group = group

    def shard_rows(self, rows: Tensor) -> Tensor:
        """The rows [share, …] that this rank encodes."""
        if self.group is None:
            return rows
        share = -(-len(rows) // self.group.size())
        first = self.group.rank() * share
        return rows[torch.arange(first, first + share).clamp(max=len(rows) - 1)]

    def all_gather_rows(self, encoded: Tensor, count: int) -> Tensor:
        """What all peers made of their rows, in the order of the `count` rows."""
        if self.group is None:
            return encoded
        parts = [torch.empty_like(encoded) for _ in range(self.group.size())]
        dist.all_gather(parts, encoded.contiguous(), group=self.group)
        return torch.cat(parts)[:count]


ALONE = Peers(None)
"""A rank with samples of its own."""
