"""Tensor parallelism: the heads and MLPs of every block are shared out among ranks.

Fused weights are stored head-major (model/layers.py), so a plain column-parallel linear gives each
rank whole heads, and a row-parallel one sums the ranks' contributions: one all-reduce for each
pair. Activations between the pairs are whole on every rank.
"""

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torchtitan.distributed import NoParallel

from torchtitan_flux.model import FluxModel
from torchtitan_flux.model.args import EMBEDDERS


def apply_tensor_parallel(model: FluxModel, mesh: DeviceMesh) -> None:
    """Shard the model's weights over `mesh`, in place; the heads must divide by its size.

    Every parameter becomes a DTensor, also those that each rank keeps whole: clipping and the fused
    optimizer take no mixture.
    """
    for name, module in model.named_children():
        if name in ("img_in", "txt_in"):
            parallelize_module(module, mesh, _colwise_gathered())
        elif name in EMBEDDERS:
            parallelize_module(
                module, mesh, {"in_layer": ColwiseParallel(), "out_layer": _rowwise()}
            )
    for block in model.double_blocks.values():
        parallelize_module(block, mesh, _double_block())
    for block in model.single_blocks.values():
        parallelize_module(block, mesh, _single_block())
    final_layer = {
        "adaLN_modulation.1": _colwise_gathered(),
        # 64 columns: splitting them would cost an all-reduce of the whole sequence's gradient
        "linear": NoParallel(),
    }
    if hasattr(model, "final_layer"):  # only the last pipeline stage has it
        parallelize_module(model.final_layer, mesh, final_layer)


def _colwise_gathered() -> ParallelStyle:
    """Each rank computes a part of the features, and all get the whole."""
    return ColwiseParallel(output_layouts=Replicate())


def _rowwise() -> ParallelStyle:
    return RowwiseParallel(output_layouts=Replicate())


def _per_head_norm() -> ParallelStyle:
    """QK-norm on [b, heads, tokens, head_dim]: a rank sees its heads only, so the gradients of the
    shared weight are summed. As a replicated module they would not be: 73 % off, silently."""
    return SequenceParallel(sequence_dim=1, use_local_output=True)


def _double_block() -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {}
    for stream in ("img", "txt"):
        plan |= {
            f"{stream}_mod.lin": _colwise_gathered(),
            f"{stream}_attn.qkv_by_head": ColwiseParallel(),
            f"{stream}_attn.norm.query_norm": _per_head_norm(),
            f"{stream}_attn.norm.key_norm": _per_head_norm(),
            f"{stream}_attn.proj": _rowwise(),
            f"{stream}_mlp.0": ColwiseParallel(),
            f"{stream}_mlp.2": _rowwise(),
        }
    return plan


def _single_block() -> dict[str, ParallelStyle]:
    return {
        "modulation.lin": _colwise_gathered(),
        "linear1_by_head": ColwiseParallel(),
        "norm.query_norm": _per_head_norm(),
        "norm.key_norm": _per_head_norm(),
        "linear2_by_head": _rowwise(),
    }
