"""Short runs of flux-tiny, on forked ranks."""

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from helpers import randomize
from ranks import run_ranks
from torch import Tensor
from torchtitan.tools.logging import logger
from twins import fill

from torchtitan_flux.model import FluxModel
from torchtitan_flux.startup.load_config import load_config
from torchtitan_flux.startup.model_args import sample_settings
from torchtitan_flux.training.metrics import FluxMetrics
from torchtitan_flux.training.trainer import FluxTrainer

STEPS = 20
GLOBAL_BATCH = 8


def arguments(dump: Path, local_batch: int, *more: str) -> list[str]:
    """flux-tiny in latent space on shapes, fp32, everything random switched on."""
    return [
        "--job.config_file", "train_configs/debug_model.toml",
        "--job.dump_folder", str(dump),
        "--model.flavor", "flux-tiny",
        "--training.img_size", "64",
        "--encoder.max_t5_encoding_len", "32",
        "--training.global_batch_size", str(GLOBAL_BATCH),
        "--training.local_batch_size", str(local_batch),
        "--training.steps", str(STEPS),
        "--training.flip_prob", "0.5",
        "--optimizer.lr", "8e-4",
        "--lr_scheduler.warmup_steps", "4",
        "--activation_checkpoint.mode", "none",
        "--debug.seed", "7",
        "--metrics.log_freq", "1",
        "--checkpoint.enable",
        "--checkpoint.interval", "10",
        "--checkpoint.no-last_save_model_only",
        *more,
    ]  # fmt: skip


@dataclass
class Run:
    """What one rank saw of a run."""

    losses: dict[int, float]
    log: str
    weights: dict[str, Tensor]
    error: str
    results: list[str]


def train(argv: list[str], change: Callable[[FluxTrainer], None] | None = None) -> Run:
    """One run on the ranks that are joined; `change` may alter its trainer first."""
    losses: dict[int, float] = {}
    log = FluxMetrics.log

    def recorded(self, step, loss, *args, **kwargs):
        losses[step] = loss
        log(self, step, loss, *args, **kwargs)

    FluxMetrics.log = recorded
    lines = io.StringIO()
    logger.addHandler(logging.StreamHandler(lines))
    logger.setLevel(logging.INFO)
    trainer = FluxTrainer(load_config(argv))
    if change is not None:
        change(trainer)
    error = ""
    try:
        trainer.train()
    except RuntimeError as raised:
        error = f"{type(raised).__name__}: {raised}"
    weights = {
        name: parameter.full_tensor().detach().clone()
        for part in trainer.model_parts
        for name, parameter in part.named_parameters()
    }
    trainer.close()
    return Run(losses, lines.getvalue(), weights, error, trainer.results)


def trained(ranks: int, argv: list[str]) -> Run:
    """What rank 0 saw of a run without an error, whose losses all ranks have."""
    runs = run_ranks(ranks, train, argv)
    assert all(one.losses == runs[0].losses for one in runs), "ranks disagree on the loss"
    assert [one.error for one in runs] == [""] * ranks
    return runs[0]


def loss_series(ranks: int, argv: list[str]) -> dict[int, float]:
    return trained(ranks, argv).losses


def worst(series: dict[int, float], reference: dict[int, float]) -> float:
    """Largest relative difference over the steps of `series`."""
    return max(abs(series[s] - reference[s]) / abs(reference[s]) for s in series)


def refusal(argv: list[str]) -> str:
    try:
        FluxTrainer(load_config(argv))
    except ValueError as error:
        return str(error)
    return "not refused"


def painted_and_measured(argv: list[str]) -> tuple[Tensor, float]:
    """Pictures and validation loss of a randomised model (at the DiT start both are trivial)."""
    trainer = FluxTrainer(load_config(argv))
    values = dict(randomize(FluxModel(trainer.model_args), 3).named_parameters())
    for part in trainer.model_parts:
        fill(part, values)
    images = trainer.image_sampler.sample(
        [f"picture {i}" for i in range(5)], sample_settings(trainer.job_config, trainer.model_args)
    )
    losses = []
    trainer.validator.metrics.log_validation = lambda loss, *_: losses.append(loss)
    trainer.validator.validate(trainer.model_parts, 1)
    trainer.close()
    return images, losses[0]
