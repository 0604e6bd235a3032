"""Weights of any readable format into a sharded model: each rank reads its own shards alone."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchtitan_flux.model import FLAVORS, FluxModelArgs
from torchtitan_flux.shards import box, local
from torchtitan_flux.tensor_files.element_types import narrows
from torchtitan_flux.weights.open import Guidance, Unknown, Weights, open_weights


def open_for(
    path: Path,
    flavor: str,
    args: FluxModelArgs,
    guidance: Guidance,
    unknown: Unknown,
    contents: bool = True,
) -> Weights:
    """`open_weights` for a configured model of this flavor; collective for a checkpoint of ours.

    Raises ValueError or OSError: why they cannot be used, and of which flavor they are.
    """
    try:
        return open_weights(path, args, guidance, unknown=unknown, contents=contents)
    except ValueError as error:
        others = [name for name in _flavors_of(path) if name != flavor]
        if not others:
            raise
        raise ValueError(
            f"{error}; model.flavor = {flavor!r}, and these are weights of {' or '.join(others)}"
        ) from None


def _flavors_of(path: Path) -> list[str]:
    """Flavors that weights can be of, whatever the widths of their encoders."""
    try:
        found = open_weights(path, alone=True, contents=False).args
    except (ValueError, OSError):
        return []
    same = ("hidden_size", "num_heads", "depth", "depth_single_blocks", "guidance_embed")
    return [
        flavor
        for flavor, args in FLAVORS.items()
        if all(getattr(args, name) == getattr(found, name) for name in same)
    ]


@torch.no_grad()
def import_weights(parameters: Mapping[str, Tensor], weights: Weights) -> None:
    """Give parameters the values of a file or folder, in place and in their own dtype.

    No communication: every rank maps the files and reads the part that it holds, one parameter at a
    time. `parameters`: by canonical name, sharded in any dimensions; a pipeline rank has its own.
    """
    for name, parameter in parameters.items():
        shard = local(parameter)
        if shard.numel() == 0:
            continue
        # where nothing can be lost, the cast is the device's
        narrow = narrows(weights.dtypes[name], shard.dtype)
        values = weights.read(name, box(parameter), shard.dtype if narrow else None)
        assert values.shape == shard.shape, name  # copy_ would broadcast
        shard.copy_(values)
