"""Fill a model's parameters, each rank only its own shards (contract 3)."""

import torch
from torch import Tensor, nn
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
        local, slices = own_slices(parameter)
        if local.numel() == 0:
            continue
        first, rows = slices[0].start, local.shape[0]
        # a slab of rows at a time: a 3072 x 12288 weight needs no second copy in memory
        rows_at_once = max(1, 8 * BLOCK // max(1, shape[-1]))
        for row in range(0, rows, rows_at_once):
            count = min(rows_at_once, rows - row)
            values = initial_rows(seed, canonical_name(name), shape, first + row, count)
            local[row : row + count].copy_(values[(slice(None), *slices[1:])])


def own_slices(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """What this rank holds of a parameter, and where that lies in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(0, size) for size in parameter.shape)
    extent, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    slices = [slice(begin, begin + size) for begin, size in zip(offset, extent, strict=True)]
    return parameter.to_local(), tuple(slices)
