"""A trained model and its frozen parts, ready to draw or to be measured, without a trainer."""

from dataclasses import dataclass
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools.logging import logger

from torchtitan_flux.checkpoint.folder import choose_checkpoint, step_folder
from torchtitan_flux.checkpoint.storage import load_states
from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.parallelize import shard_model
from torchtitan_flux.paths import locate
from torchtitan_flux.startup.model_args import resolve_model_args
from torchtitan_flux.tensor_files.hub_cache import why_absent
from torchtitan_flux.training.conditioning import FrozenParts, build_frozen_parts, build_tokenizer
from torchtitan_flux.training.distributed_sampler import Painter
from torchtitan_flux.training.process import start_process_group
from torchtitan_flux.training.resume import checkpoint_folder
from torchtitan_flux.weights.dcp_source import DcpSource
from torchtitan_flux.weights.load import import_weights, open_for
from torchtitan_flux.weights.open import Weights
from torchtitan_flux.weights.pruned import blocks_told


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

    config: FluxJobConfig
    args: FluxModelArgs
    model: FluxModel
    parts: FrozenParts
    painter: Painter
    checkpoint: Path


@dataclass(frozen=True)
class InferenceContext:
    """What is known before anything is loaded.

    Attributes:
        config: the run's configuration.
        args: resolved model arguments.
        device: of this rank.
        dtype: of weights and computation.
        dims: all ranks share the weights, whatever mesh the run was trained on.
        weights: opened, where they are not the run's own.
        checkpoint: where the weights are.
        average: decay of their average, where that is drawn with.
    """

    config: FluxJobConfig
    args: FluxModelArgs
    device: torch.device
    dtype: torch.dtype
    dims: FluxParallelDims
    weights: Weights | None
    checkpoint: Path
    average: str | None = None

    def open_weights(self) -> Weights:
        """Of whichever kind, to be read part by part."""
        return self.weights or Weights(
            self.checkpoint, "dcp", self.args, DcpSource(self.checkpoint, self.average)
        )


def open_run(
    config: FluxJobConfig, weights: str | None = None, average: str | None = None
) -> InferenceContext:
    """Find the checkpoint that `checkpoint.load_step` names (-1: the newest) of a run, or weights.

    Works under torchrun on any number of ranks, and in a plain process as one rank.

    Args:
        config: from `load_config`.
        weights: file or folder of any readable format, instead of the run's checkpoint.
        average: decay of the average of its weights to draw with, "" where there is one.

    Raises:
        FileNotFoundError: naming the folder that holds no checkpoint, or the weights.
        ValueError: naming what does not fit the configured model.
    """
    device = start_process_group(config)
    args = resolve_model_args(config, weights, training=False)
    opened = None if weights is None else _open(weights, args, config)
    checkpoint = find_checkpoint(config) if opened is None else opened.path
    if note := blocks_told(checkpoint, config.model.flavor, args):
        logger.warning(note)
    world_size = torch.distributed.get_world_size()
    return InferenceContext(
        config,
        args,
        device,
        TORCH_DTYPE_MAP[config.training.mixed_precision_param],
        FluxParallelDims(1, world_size, 1, 1, 1, 1, 1, world_size),
        opened,
        checkpoint,
        average,
    )


def load_model(context: InferenceContext, batch_size: int = 64) -> Session:
    """Load model, encoders and codec, all of them at once.

    Nothing is trained, so that weights are kept in the type that they compute in.

    Args:
        context: from `open_run`.
        batch_size: pictures that one rank draws at once.
    """
    args, device, dtype, dims = context.args, context.device, context.dtype, context.dims
    with torch.device("meta"):
        model = FluxModel(args).to(dtype)
    shard_model(model, dims.data_mesh, param_dtype=dtype)
    model.to_empty(device=device)
    if context.weights is not None or context.average is not None:
        import_weights(dict(model.named_parameters()), context.open_weights())
    else:
        parameters = get_model_state_dict(model)
        load_states(parameters, set(parameters), context.checkpoint)
        set_model_state_dict(model, parameters)
    model.eval().requires_grad_(False)

    tokenizer = build_tokenizer(context.config)
    parts = build_frozen_parts(context.config, args, tokenizer, dims, device, dtype)
    painter = Painter(model, parts, args.geometry, dims, batch_size)
    return Session(context.config, args, model, parts, painter, context.checkpoint)


def open_session(
    config: FluxJobConfig, batch_size: int = 64, weights: str | None = None
) -> Session:
    """`open_run` and `load_model`."""
    return load_model(open_run(config, weights), batch_size)


def _open(weights: str, args: FluxModelArgs, config: FluxJobConfig) -> Weights:
    path = locate(weights)
    if path is None:
        raise FileNotFoundError(f"--weights {weights} {why_absent(weights)}")
    c = config.checkpoint
    try:
        return open_for(path, config.model.flavor, args, c.guidance_weights, c.unknown_weights)
    except (ValueError, OSError) as error:
        raise ValueError(f"--weights {weights}: {error}") from None


def find_checkpoint(config: FluxJobConfig) -> Path:
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
