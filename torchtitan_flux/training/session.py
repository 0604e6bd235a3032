"""A trained model and its frozen parts, ready to draw or to be measured, without a trainer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchtitan_flux.engine  # noqa: F401  (before torchtitan)

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torchtitan.config import TORCH_DTYPE_MAP

from torchtitan_flux.checkpoint.run_facts import step_to_load
from torchtitan_flux.config.resolve import resolve_model_args
from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.parallelize import shard_model
from torchtitan_flux.training.conditioning import FrozenParts, build_frozen_parts, build_tokenizer
from torchtitan_flux.training.pictures import Painter
from torchtitan_flux.training.process import start_process_group


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
    checkpoint = find_checkpoint(config)
    device = start_process_group(config)
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
    dcp.load(weights, checkpoint_id=str(checkpoint))
    set_model_state_dict(model, weights)
    model.eval().requires_grad_(False)

    parts = build_frozen_parts(config, args, build_tokenizer(config), dims, device, dtype)
    painter = Painter(model, parts, args.geometry, dims, batch_size)
    return Session(config, args, model, parts, painter, checkpoint)


def find_checkpoint(config: Any) -> Path:
    """The checkpoint folder that `checkpoint.load_step` means, or the newest.

    Raises:
        FileNotFoundError: naming the folder, and the keys that lead to it.
    """
    folder = Path(config.job.dump_folder) / config.checkpoint.folder
    step = step_to_load(folder, config.checkpoint.load_step)
    if step is None:
        raise FileNotFoundError(
            f"no checkpoint in {folder} (job.dump_folder, checkpoint.folder): train first with "
            "./run_train.sh, or name the run's dump folder"
        )
    checkpoint = folder / f"step-{step}"
    if not (checkpoint / ".metadata").is_file():
        raise FileNotFoundError(f"no checkpoint at {checkpoint} (checkpoint.load_step = {step})")
    return checkpoint
