"""A trained model and its frozen parts, ready to draw or to be measured, without a trainer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchtitan_flux.engine  # noqa: F401  (before torchtitan)

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.logging import logger

from torchtitan_flux.checkpoint.folder import choose_checkpoint, step_folder
from torchtitan_flux.checkpoint.storage import load_states
from torchtitan_flux.config.resolve import resolve_model_args
from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.parallelize import shard_model
from torchtitan_flux.training.conditioning import FrozenParts, build_frozen_parts, build_tokenizer
from torchtitan_flux.training.pictures import Painter
from torchtitan_flux.training.process import start_process_group
from torchtitan_flux.training.settle import checkpoint_folder


@dataclass
class Session:
    """What `open_session` returns.

    Attributes:
        config: the run's configuration.
        args: resolved model arguments.
        model: the trained model, sharded over the ranks.
        parts: encoders and codec.
        painter: draws with them.
        checkpoint: where the weights came from.
    """

    config: Any
    args: FluxModelArgs
    model: FluxModel
    parts: FrozenParts
    painter: Painter
    checkpoint: Path


def open_session(config: Any, batch_size: int = 64) -> Session:
    """Load the checkpoint that `checkpoint.load_step` names (-1: the newest) of a run.

    Works under torchrun on any number of ranks, and in a plain process as one rank.

    Args:
        config: from `load_config`.
        batch_size: pictures that one rank draws at once.

    Raises:
        FileNotFoundError: naming the folder that holds no checkpoint.
    """
    device = start_process_group(config)
    checkpoint = find_checkpoint(config)
    world_size = torch.distributed.get_world_size()
    # all ranks share the weights, whatever mesh the run was trained on
    dims = FluxParallelDims(1, world_size, 1, 1, 1, 1, 1, world_size)
    dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
    args = resolve_model_args(config)
    with torch.device("meta"):
        model = FluxModel(args)
    shard_model(model, dims.data_mesh, param_dtype=dtype)
    model.to_empty(device=device)
    weights = get_model_state_dict(model)
    load_states(weights, set(weights), checkpoint)
    set_model_state_dict(model, weights)
    model.eval().requires_grad_(False)

    parts = build_frozen_parts(config, args, build_tokenizer(config), dims, device, dtype)
    painter = Painter(model, parts, args.geometry, dims, batch_size)
    return Session(config, args, model, parts, painter, checkpoint)


def find_checkpoint(config: Any) -> Path:
    """The checkpoint folder that `checkpoint.load_step` means, or the newest that is good.

    Raises:
        FileNotFoundError: naming the folder, what is wrong there, and the keys that lead to it.
    """
    folder = checkpoint_folder(config)
    choice = choose_checkpoint(folder, config.checkpoint.load_step)
    damaged = [f"{step_folder(folder, s)} is damaged: {why}" for s, why in choice.damaged.items()]
    if choice.folder is None:
        listed = "".join(f"\n  - {line}" for line in damaged)
        raise FileNotFoundError(
            f"no good checkpoint in {folder} (job.dump_folder, checkpoint.folder, "
            f"checkpoint.load_step): train first with ./run_train.sh, or name the run's dump "
            f"folder{listed}"
        )
    for line in damaged:
        logger.warning(f"{line}; using {choice.folder.name}")
    return choice.folder
