"""What this rank holds of a tensor, distributed or not."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(value: Tensor) -> Tensor:
    """This rank's shard; a tensor that is not distributed is its own."""
    return value.to_local() if isinstance(value, DTensor) else value


def box(value: Tensor) -> tuple[slice, ...]:
    """Where this rank's shard lies in the whole.

    One box on every mesh: tensor parallelism cuts first and FSDP cuts the pieces.
    """
    if not isinstance(value, DTensor):
        return tuple(slice(0, size) for size in value.shape)
    (chunk,) = value.__create_chunk_list__()  # what DCP saves and loads by
    return tuple(slice(at, at + n) for at, n in zip(chunk.offsets, chunk.sizes, strict=True))


def laid_out_as(value: Tensor, shard: Tensor) -> Tensor:
    """A tensor sharded like `value`, of which this rank has `shard`."""
    if not isinstance(value, DTensor):
        return shard
    return DTensor.from_local(
        shard, value.device_mesh, value.placements, shape=value.shape, stride=value.stride()
    )
