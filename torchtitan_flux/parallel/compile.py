"""torch.compile for one block at a time: two graphs serve all 57 layers of FLUX.1.

A graph is made for each size, with the sizes as constants (docs/decisions.md), and for training
and evaluation each. `fullgraph`: what cannot be one graph is an error, never silently slow.
"""

from collections.abc import Callable

import torch
import torch._dynamo.config
from torch import Tensor

from torchtitan_flux.flow_matching import squared_errors
from torchtitan_flux.model import FluxModel
from torchtitan_flux.parallel.activation_checkpoint import SavesByOperation

GRAPHS_PER_BLOCK = 256
"""Sizes that a run may meet; torch's own limit of 8 would end a run that trains on ten."""


def compile_blocks(model: FluxModel, backend: str) -> None:
    """Compile each block, in place; after activation checkpointing and before fully_shard.

    A checkpoint of a whole block goes around the compiled block, which works with every parallelism
    and lets saved inputs be offloaded; a choice among operations is a part of the graph.
    """
    torch._dynamo.config.recompile_limit = GRAPHS_PER_BLOCK
    for blocks in (model.double_blocks, model.single_blocks):
        for block in blocks.values():
            if not isinstance(block, SavesByOperation):
                block = getattr(block, "_checkpoint_wrapped_module", block)
            block.compile(backend=backend, fullgraph=True, dynamic=False)


def compiled_squared_errors(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    """`flow_matching.squared_errors` as one kernel, for `sample_losses`."""
    return torch.compile(squared_errors, backend=backend, fullgraph=True, dynamic=False)
