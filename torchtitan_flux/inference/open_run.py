"""A trained model and its frozen parts, ready to draw or to be measured, without a trainer."""

from dataclasses import dataclass
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.config.job_config import Parallelism
from torchtitan.tools.logging import logger

from torchtitan_flux.checkpoint.folder import choose_checkpoint, step_folder
from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.parallelize import shard_model
from torchtitan_flux.paths import locate, why_absent
from torchtitan_flux.startup.model_args import resolve_model_args
from torchtitan_flux.training.conditioning import (
    FrozenEncoders,
    build_frozen_encoders,
    build_tokenizer,
)
from torchtitan_flux.training.process import start_process_group
from torchtitan_flux.training.resume import checkpoint_folder
from torchtitan_flux.weights.dcp_source import DcpSource
from torchtitan_flux.weights.open import Weights, import_weights, open_weights
from torchtitan_flux.weights.pruned import blocks_told


@dataclass(frozen=True)
class InferenceContext:
    """What is known before anything is loaded.

    Attributes:
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

    @property
    def names(self) -> dict[str, str]:
        """What a picture names of what it is drawn with."""
        encoder, own = self.config.encoder, self.weights is None
        return {
            "flavor": self.config.model.flavor,
            "dtype": self.config.training.mixed_precision_param,
            "text_tokens": str(encoder.max_t5_encoding_len),
            "t5": encoder.t5_encoder,
            "clip": encoder.clip_encoder,
            "autoencoder": encoder.autoencoder_path,
            "checkpoint" if own else "weights": str(self.checkpoint),
            **({"step": self.checkpoint.name.removeprefix("step-")} if own else {}),
            **({} if self.average is None else {"ema": self.average}),
        }

    def open_weights(self) -> Weights:
        """Of whichever kind, to be read part by part."""
        return self.weights or Weights(
            self.checkpoint, "dcp", self.args, DcpSource(self.checkpoint, self.average)
        )


def open_run(
    config: FluxJobConfig, weights: str | None = None, average: str | None = None
) -> InferenceContext:
    """Find the checkpoint that `checkpoint.load_step` names (-1: the newest) of a run, or weights.

    Args:
        config: of the run.
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
    ranks = torch.distributed.get_world_size()
    dims = FluxParallelDims.of(Parallelism(), ranks)
    dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
    return InferenceContext(config, args, device, dtype, dims, opened, checkpoint, average)


def load_model(context: InferenceContext) -> tuple[FluxModel, FrozenEncoders]:
    """Model, sharded over the ranks, encoders and codec, all of them at once.

    Nothing is trained, so that weights are kept in the type that they compute in.
    """
    args, device, dtype, dims = context.args, context.device, context.dtype, context.dims
    with torch.device("meta"):
        model = FluxModel(args).to(dtype)
    shard_model(model, dims.data_mesh, param_dtype=dtype)
    model.to_empty(device=device)
    import_weights(dict(model.named_parameters()), context.open_weights())
    model.eval().requires_grad_(False)
    tokenizer = build_tokenizer(context.config)
    return model, build_frozen_encoders(context.config, args, tokenizer, dims, device, dtype)


def _open(weights: str, args: FluxModelArgs, config: FluxJobConfig) -> Weights:
    path = locate(weights)
    if path is None:
        raise FileNotFoundError(f"--weights {weights} {why_absent(weights)}")
    c = config.checkpoint
    try:
        return open_weights(path, args, c.guidance_weights, unknown=c.unknown_weights)
    except (ValueError, OSError) as error:
        raise ValueError(f"--weights {weights}: {error}") from None


def find_checkpoint(config: FluxJobConfig) -> Path:
    """The checkpoint folder that `checkpoint.load_step` means, or the newest that is good."""
    folder = checkpoint_folder(config)
    choice = choose_checkpoint(folder, config.checkpoint.load_step)
    damaged = [f"{step_folder(folder, s)} is damaged: {why}" for s, why in choice.damaged.items()]
    if choice.folder is None:
        message = (
            f"no good checkpoint in {folder} (job.dump_folder, checkpoint.folder, "
            "checkpoint.load_step): train with ./run_train.sh, or name the run's dump folder"
        )
        raise FileNotFoundError("\n  - ".join([message, *damaged]))
    for line in damaged:
        logger.warning(f"{line}; using {choice.folder.name}")
    return choice.folder
