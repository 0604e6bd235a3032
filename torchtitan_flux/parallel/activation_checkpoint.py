"""Activation checkpointing: what `activation_checkpoint.mode` says is what happens.

none            activations are kept until the backward pass.
full            each block keeps its inputs only and is run again in the backward pass.
selective       option "N": every N-th block as in `full`, the others as in `none`.
                option "op": what `SAVED_OPS` give is kept, the cheap rest is run again.
memory_budget   the compiler chooses what to keep in each block's graph.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
import torch._functorch.config
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import Problem, violated
from torchtitan_flux.model import FluxModel

_aten, _collective = torch.ops.aten, torch.ops._c10d_functional

# A kept byte (bf16) saves as many operations as its producer did: 2 x tokens of attention, as many
# as input features of a linear, so 3072 to 15360 for FLUX.1; a norm, an activation or a rotation
# costs a few hundred in memory traffic. Hence all matrix products, none of the rest, and not every
# second product: which ones that are would depend on the order of lines in the model.
SAVED_OPS = [
    _aten.addmm.default,  # linears with bias; without one they are mm
    _aten.mm.default,
    _aten._scaled_mm.default,  # in float8
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    # what came over the network is more expensive still
    _collective.all_to_all_single.default,
    _collective.all_reduce.default,
    _collective.all_gather_into_tensor.default,
]


COMPILED = ("model", "loss")


class SavesByOperation(CheckpointWrapper):
    """A block that keeps the results of some operations: a compiler has to see the choice."""


def apply_activation_checkpoint(
    model: FluxModel,
    mode: str,
    selective_ac_option: str = "op",
    memory_budget: float = 1.0,
    offload_inputs: bool = False,
    **options: Any,
) -> None:
    """Wrap the blocks that are to be recomputed, in place; a wrapper's `state_dict` has the bare
    names. Arguments are those of [activation_checkpoint], `options` those of torch's checkpoint.

    Blocks are counted from 1, double blocks first, so that "2" means the second, the fourth …
    """
    # read by the compiler when it cuts a graph into forward and backward; 1 keeps what is fastest
    torch._functorch.config.activation_memory_budget = (
        memory_budget if mode == "memory_budget" else 1.0
    )
    if mode not in ("full", "selective"):
        return
    by_operation = mode == "selective" and selective_ac_option == "op"
    every = 1 if mode == "full" or by_operation else int(selective_ac_option)
    contexts = functools.partial(create_selective_checkpoint_contexts, SAVED_OPS)
    blocks = [
        (group, name) for group in (model.double_blocks, model.single_blocks) for name in group
    ]
    for group, name in blocks[every - 1 :: every]:
        if by_operation:
            group[name] = SavesByOperation(group[name], context_fn=contexts, **options)
        else:
            run = _checkpoint_with_inputs_on_cpu if offload_inputs else None
            group[name] = checkpoint_wrapper(group[name], checkpoint_fn=run, **options)


def _checkpoint_with_inputs_on_cpu(block: nn.Module, *inputs: Any, **options: Any) -> Any:
    """torch.utils.checkpoint, its saved inputs in pinned memory where there is a GPU.

    What the block saves inside is the checkpoint's own matter, so nothing else is moved.
    """
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(block, *inputs, use_reentrant=False, **options)


def recomputation_problems(config: FluxJobConfig) -> Iterator[Problem]:
    """What cannot work in the sections [activation_checkpoint] and [compile]."""
    ac, compiling = config.activation_checkpoint, config.compile
    section, option, budget = "activation_checkpoint.", ac.selective_ac_option, "memory_budget"
    by_number = option.isdecimal() and int(option) > 0
    whole_blocks = ac.mode == "full" or (ac.mode == "selective" and by_number)
    unknown = ", ".join(name for name in compiling.components if name not in COMPILED)
    yield from violated(
        (
            ac.mode == "selective" and option != "op" and not by_number,
            section + "selective_ac_option",
            'must be "op", or a number N >= 1 in quotes to recompute every N-th block',
        ),
        (
            ac.mode == budget and not config.compiles("model"),
            section + "mode",
            'is a choice of the compiler: set compile.enable = true with "model" in '
            "compile.components, or use another mode",
            "compile.enable",
        ),
        (
            ac.mode == budget and config.parallelism.tensor_parallel_degree > 1,
            section + "mode",
            'the compiler cannot size the graphs of tensor parallelism; use mode = "selective", or '
            "set parallelism.tensor_parallel_degree = 1",
            "parallelism.tensor_parallel_degree",
        ),
        (
            ac.offload_inputs and not whole_blocks,
            section + "offload_inputs",
            'needs blocks that are recomputed as a whole: set activation_checkpoint.mode = "full", '
            'or "selective" with a number, or offload_inputs = false',
            section + "mode",
        ),
        (
            ac.debug and ac.mode == "selective" and option == "op",
            section + "debug",
            'does not go with selective_ac_option = "op"; set one of them otherwise',
        ),
        (
            compiling.enable and unknown,
            "compile.components",
            f"{unknown} is unknown; known: {', '.join(COMPILED)}",
        ),
        (
            compiling.enable and compiling.backend not in torch.compiler.list_backends(()),
            "compile.backend",
            f"is not available; torch has {', '.join(torch.compiler.list_backends())}",
        ),
    )
