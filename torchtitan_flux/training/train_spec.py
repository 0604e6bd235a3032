"""Registers "flux" with torchtitan; `experimental.custom_import` names this module."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torch import nn
from torchtitan.components.loss import build_mse_loss
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.model import FLAVORS, FluxModel, FluxModelArgs, flops_per_image
from torchtitan_flux.optimizers import FluxOptimizers
from torchtitan_flux.parallel import low_precision  # noqa: F401  (our converters, for torchtitan's)
from torchtitan_flux.parallel.parallelize import parallelize_flux
from torchtitan_flux.parallel.pipeline import pipeline_flux
from torchtitan_flux.startup.model_args import resolve_model_args
from torchtitan_flux.training.conditioning import build_tokenizer
from torchtitan_flux.training.data import build_dataloader
from torchtitan_flux.training.metrics import FluxMetrics


@dataclass(frozen=True)
class FluxTrainArgs(FluxModelArgs):
    """FluxModelArgs with the two methods that torchtitan's trainer calls."""

    def update_from_config(self, job_config: FluxJobConfig) -> None:
        """Take the widths of the configured encoders and codec, in place (a fresh copy)."""
        resolved = resolve_model_args(job_config)
        for field in fields(resolved):
            object.__setattr__(self, field.name, getattr(resolved, field.name))
        object.__setattr__(self, "_size", job_config.training.image_size)
        object.__setattr__(self, "_text_tokens", job_config.encoder.max_t5_encoding_len)

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters, and training FLOPs of one token of the joint sequence.

        `seq_len` is torchtitan's; the sequence of an image follows from its size.
        """
        size, text_tokens = self._size, self._text_tokens  # type: ignore[attr-defined]
        tokens = self.geometry.grid(size).tokens + text_tokens
        parameters = sum(p.numel() for p in model.parameters())
        return parameters, flops_per_image(self, size, text_tokens) // tokens


class FlavorArgs(Mapping[str, FluxTrainArgs]):
    """The flavors, a fresh copy at each look-up: torchtitan updates what it is given in place."""

    def __getitem__(self, flavor: str) -> FluxTrainArgs:
        args = FLAVORS[flavor]
        return FluxTrainArgs(**{f.name: getattr(args, f.name) for f in fields(args)})

    def __iter__(self) -> Iterator[str]:
        return iter(FLAVORS)

    def __len__(self) -> int:
        return len(FLAVORS)


def no_validator_yet(**_: Any) -> None:
    """torchtitan builds the validator before encoders exist; FluxTrainer assigns it afterwards."""


register_train_spec(
    "flux",
    TrainSpec(
        model_cls=FluxModel,  # type: ignore[arg-type]
        model_args=FlavorArgs(),  # type: ignore[arg-type]
        parallelize_fn=parallelize_flux,
        pipelining_fn=pipeline_flux,  # type: ignore[arg-type]
        build_optimizers_fn=FluxOptimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_dataloader,  # type: ignore[arg-type]
        build_tokenizer_fn=build_tokenizer,  # type: ignore[arg-type]
        build_loss_fn=build_mse_loss,
        build_validator_fn=no_validator_yet,  # type: ignore[arg-type]
        build_metrics_processor_fn=FluxMetrics,
    ),
)
