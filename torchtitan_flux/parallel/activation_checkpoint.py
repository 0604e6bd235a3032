"""Activation checkpointing: what `activation_checkpoint.mode` says is what happens."""

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from torchtitan_flux.config.checks import AC_MODES
from torchtitan_flux.model import FluxModel


def apply_activation_checkpoint(model: FluxModel, mode: str, preserve_rng_state: bool) -> None:
    """Recompute each block's activations in the backward pass (mode "full"), or keep them ("none").

    Raises:
        ValueError: for a mode that does not exist here.
    """
    if mode not in AC_MODES:
        raise ValueError(
            f"activation_checkpoint.mode = {mode!r} is not available; use one of {AC_MODES}"
        )
    if mode == "none":
        return
    for blocks in (model.double_blocks, model.single_blocks):
        for name, block in list(blocks.items()):
            blocks[name] = checkpoint_wrapper(block, preserve_rng_state=preserve_rng_state)
