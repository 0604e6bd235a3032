"""Registers "flux" with torchtitan; `experimental.custom_import` names this module."""

from copy import copy
from dataclasses import asdict, dataclass

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
        """Take the widths of the configured encoders and codec, in place for torchtitan."""
        vars(self).update(vars(resolve_model_args(job_config)))
        vars(self)["_size"] = job_config.training.image_size
        vars(self)["_text_tokens"] = job_config.encoder.max_t5_encoding_len

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters, and training FLOPs of one token of the joint sequence.

        `seq_len` is torchtitan's; the sequence of an image follows from its size.
        """
        size, text_tokens = self._size, self._text_tokens  # type: ignore[attr-defined]
        tokens = self.geometry.grid(size).tokens + text_tokens
        parameters = sum(p.numel() for p in model.parameters())
        return parameters, flops_per_image(self, size, text_tokens) // tokens


class _Copies(dict):
    """A copy at each look-up: torchtitan updates what it is given in place."""

    def __getitem__(self, flavor: str) -> FluxTrainArgs:
        return copy(super().__getitem__(flavor))


register_train_spec(
    "flux",
    TrainSpec(
        model_cls=FluxModel,  # type: ignore[arg-type]
        model_args=_Copies(  # type: ignore[arg-type]
            {name: FluxTrainArgs(**asdict(args)) for name, args in FLAVORS.items()}
        ),
        parallelize_fn=parallelize_flux,
        pipelining_fn=pipeline_flux,  # type: ignore[arg-type]
        build_optimizers_fn=FluxOptimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_dataloader,  # type: ignore[arg-type]
        build_tokenizer_fn=build_tokenizer,  # type: ignore[arg-type]
        build_loss_fn=build_mse_loss,
        # FluxTrainer assigns it when there are encoders
        build_validator_fn=lambda **_: None,  # type: ignore[arg-type]
        build_metrics_processor_fn=FluxMetrics,
    ),
)
