"""Fill a model's parameters, each rank only its own shards (contract 3)."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchtitan_flux.model.initial_values import BLOCK, canonical_name, initial_rows


@torch.no_grad()
def fill_initial_values(
    model: nn.Module, seed: int, buffer_device: torch.device | None = None
) -> None:
    """Give every parameter its initial value, a function of (seed, name, block of elements).

    Args:
        model: materialised; its parameters may be DTensors sharded in any dimensions.
        seed: the run's seed.
        buffer_device: part of torchtitan's signature; the model has no buffers.
    """
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if isinstance(parameter, DTensor):
            local = parameter.to_local()
            extent, offset = compute_local_shape_and_global_offset(
                shape, parameter.device_mesh, parameter.placements
            )
        else:
            local, extent, offset = parameter, shape, (0,) * len(shape)
        if local.numel() == 0:
            continue
        # a slab of rows at a time: a 3072 x 12288 weight needs no second copy in memory
        rows_at_once = max(1, 8 * BLOCK // max(1, shape[-1]))
        other_dims = tuple(
            slice(begin, begin + length)
            for begin, length in zip(offset[1:], extent[1:], strict=True)
        )
        for row in range(0, extent[0], rows_at_once):
            rows = min(rows_at_once, extent[0] - row)
            values = initial_rows(seed, canonical_name(name), shape, offset[0] + row, rows)
            local[row : row + rows].copy_(values[(slice(None), *other_dims)])
