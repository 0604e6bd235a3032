"""What is wrong with a configuration, all of it: the checks of every part, and of the features."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from torchtitan_flux.checkpoint.checks import checkpoint_problems
from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.meanings import NOT_AVAILABLE
from torchtitan_flux.config.problems import ConfigError, Problem, violated
from torchtitan_flux.config.schema import get
from torchtitan_flux.data.checks import data_key_problems
from torchtitan_flux.encoders.checks import encoder_problems
from torchtitan_flux.model import FLAVORS, FluxModel, FluxModelArgs
from torchtitan_flux.model.initial_values import trainable
from torchtitan_flux.optimizers import OPTIMIZERS, WITH_BF16
from torchtitan_flux.parallel.activation_checkpoint import recomputation_problems
from torchtitan_flux.parallel.dims import mesh_problems, model_problems
from torchtitan_flux.parallel.low_precision_checks import low_precision_fit, low_precision_problems
from torchtitan_flux.parallel.pipeline_plan import pipeline_fit, pipeline_problems
from torchtitan_flux.startup.model_args import (
    AUTO,
    configured_schedule,
    own_scheduler,
    resolve_model_args,
    sample_settings,
)
from torchtitan_flux.startup.number_checks import number_problems
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.weights.checks import initial_weights_problems

FLUX_MODULES = (
    "",
    "torchtitan.models.flux.job_config",
    "torchtitan.experiments.flux.job_config",
    "torchtitan_flux.config.job_config",
)
"""Values of job.custom_config_module that mean FLUX's own sections."""

ON_GPUS = (
    "training.enable_cpu_offload",
    "training.gc_debug",
    "profiling.enable_profiling",
    "profiling.enable_memory_snapshot",
)
"""Switches of what there is on GPUs alone."""


def problems(config: FluxJobConfig, training: bool = True, ranks: int = 1) -> list[Problem]:
    """Every reason why this run cannot work; empty when there is none.

    Args:
        config: the merged JobConfig. Only paths that this run will read are looked at.
        training: whether it will train; drawing and scoring need no data, no folder to write, and
            no mesh or batch that fits, and run where the training could not.
        ranks: of the run.
    """
    model, args = _model_problems(config, training)
    drawn = args if training and not model and config.sampling.denoising_steps > 0 else None
    found = [*number_problems(config), *model]
    if training:
        low_precision = list(low_precision_problems(config))
        found += _feature_problems(config)
        found += _optimizer_problems(config)
        found += _folder_problems(config)
        found += data_key_problems(config)
        found += checkpoint_problems(config)
        found += initial_weights_problems(config, args)
        found += recomputation_problems(config)
        found += low_precision
        found += _evaluation_problems(config)
        if config.training.local_batch_size > 0:
            found += mesh_problems(config, ranks)
            found += pipeline_problems(config)
        if args is not None:
            found += model_problems(config, args)
            found += pipeline_fit(config, args)
            if not (model or low_precision):
                found += low_precision_fit(config, args, config.training.image_size)
    return [*found, *_schedule_problems(config, drawn)]


def _model_problems(
    config: FluxJobConfig, training: bool
) -> tuple[list[Problem], FluxModelArgs | None]:
    """What is wrong with the model and its encoders, and the model where nothing is."""
    flavor = FLAVORS.get(config.model.flavor)
    found = list(
        violated(
            (config.model.name != "flux", "model.name", "this trainer trains 'flux'"),
            (flavor is None, "model.flavor", f"is unknown; known: {', '.join(FLAVORS)}"),
        )
    )
    encoders = list(encoder_problems(config, flavor is not None and flavor.pixel_space))
    if flavor is None or encoders:
        return found + encoders, None
    try:
        args = resolve_model_args(config, training=training)
    except ConfigError as error:
        return found + error.problems, None
    try:
        args.geometry.check(config.training.image_size)
    except ValueError as error:
        t = config.training
        key = next(key for key in ("img_height", "img_width", "img_size") if getattr(t, key))
        found.append(Problem(f"training.{key}", str(error), ("training.img_size",)))
    return found, args


def _feature_problems(config: FluxJobConfig) -> Iterator[Problem]:
    """What does not exist here, or not on this machine."""
    defaults, gpu = FluxJobConfig(), torch.cuda.is_available()
    for key, reason in NOT_AVAILABLE.items():
        if get(config, key) != get(defaults, key):
            yield Problem(key, f"is not available ({reason}); remove the key")
    yield from violated(
        *((get(config, key) and not gpu, key, "needs a GPU; set it to false") for key in ON_GPUS),
        (
            config.checkpoint.async_mode == "async_with_pinned_mem" and not gpu,
            "checkpoint.async_mode",
            'needs a GPU; use "async"',
        ),
        (
            config.metrics.enable_wandb and find_spec("wandb") is None,
            "metrics.enable_wandb",
            "wandb is not installed: pip install wandb, or set it to false",
        ),
        (
            config.job.custom_config_module not in FLUX_MODULES,
            "job.custom_config_module",
            "is not read: the sections are FLUX's; remove the key",
        ),
    )


def _optimizer_problems(config: FluxJobConfig) -> Iterator[Problem]:
    """Optimizer, type of the weights, averages, and which parameters are trained."""
    name, dtype, ema = config.optimizer.name, config.training.dtype, config.ema
    bf16, only = dtype == "bfloat16", config.training.train_only
    kind = OPTIMIZERS.get(name)
    names = []
    if only and config.model.flavor in FLAVORS:
        with torch.device("meta"):
            names = [name for name, _ in FluxModel(FLAVORS[config.model.flavor]).named_parameters()]
    yield from violated(
        (kind is None, "optimizer.name", f"is not available; use one of {', '.join(OPTIMIZERS)}"),
        (
            bf16 and name not in WITH_BF16,
            "training.dtype",
            f"needs optimizer.name = {' or '.join(WITH_BF16)}, which then round stochastically; "
            "the compute type is training.mixed_precision_param",
            "optimizer.name",
        ),
        (
            kind is not None and (kind.torchao or bf16) and find_spec("torchao") is None,
            "optimizer.name",
            f'with training.dtype = {dtype!r} needs torchao: pip install "torchtitan-flux[float8]"',
            "training.dtype",
        ),
        (len(set(ema.decay)) < len(ema.decay), "ema.decay", "has the same decay twice"),
        (
            ema.use_for == "ema" and not ema.decay,
            "ema.use_for",
            "needs ema.decay, the decay of an average",
        ),
        (
            only and names and not any(trainable(name, only) for name in names),
            "training.train_only",
            f"names no parameter; they are called as {', '.join(names[:3])} …",
        ),
        (
            only and config.parallelism.pipeline_parallel_degree > 1,
            "training.train_only",
            "needs parallelism.pipeline_parallel_degree = 1: gradients would have to go through "
            "stages that have none",
        ),
    )


def _folder_problems(config: FluxJobConfig) -> Iterator[Problem]:
    """Folders that cannot be written, or that another run may be writing."""
    given, metrics = config.job.dump_folder, config.metrics
    if problem := _unwritable(Path(given)) if given else "is no folder; name one":
        yield Problem("job.dump_folder", problem)
        return
    for key, used in {
        "job.save_config_file": True,
        "checkpoint.folder": config.checkpoint.enable,
        "sampling.folder": config.sampling.enable,
        "metrics.save_tb_folder": metrics.enable_tensorboard or metrics.enable_wandb,
        "profiling.save_traces_folder": config.profiling.enable_profiling,
        "profiling.save_memory_snapshot_folder": config.profiling.enable_memory_snapshot,
        "comm.save_traces_folder": config.comm.trace_buf_size > 0,
    }.items():
        if not used or not (name := get(config, key)):
            continue
        path = Path(os.path.abspath(Path(given, name)))
        problem = _unwritable(path.parent if key == "job.save_config_file" else path)
        if not path.is_relative_to(os.path.abspath(given)):
            problem = "is not below job.dump_folder, which one run alone may write; name one in it"
        if problem:
            yield Problem(key, problem)


def _unwritable(folder: Path) -> str:
    """Why nothing can be put into a folder that may have to be made; "" where it can."""
    # unlike Path.exists, os.path.exists raises nothing
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        return f"{there} is a file; name a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} cannot be written by this user"
    return ""


def _schedule_problems(config: FluxJobConfig, args: FluxModelArgs | None) -> Iterator[Problem]:
    """Whether the schedule exists, and, with `args`, suits the pictures drawn while training.

    What states it has to be readable without any, too: it goes along with what is exported.
    """
    key, stated = "checkpoint.initial_load_path", config.sampling.schedule == AUTO
    try:
        configured_schedule(config)
        if args is not None and stated:
            own_scheduler(config)
        if args is not None and config.sampling.enable:
            sample_settings(config, args).times(args.geometry)
    except ConfigError as error:
        yield from error.problems
    except UnreadableWeights as error:
        yield Problem(key, f"{error}; get it again, or set sampling.schedule")
    except (ValueError, OSError) as error:
        yield Problem(key if stated else "sampling.schedule", str(error))


def _evaluation_problems(config: FluxJobConfig) -> Iterator[Problem]:
    v, sampling, steps = config.validation, config.sampling, config.training.steps
    total = config.lr_scheduler.total_steps
    yield from violated(
        (
            total is not None and steps > total,
            "training.steps",
            f"is beyond the schedule of the learning rate, lr_scheduler.total_steps = {total}; "
            "raise that, or remove it to take training.steps",
            "lr_scheduler.total_steps",
        ),
        (
            v.enable and v.steps < 1 and v.steps != -1,
            "validation.steps",
            "must be positive, or -1 for all",
        ),
        (
            sampling.enable and not sampling.prompts,
            "sampling.enable",
            "needs sampling.prompts, a list of captions",
            "sampling.prompts",
        ),
    )
    for section in ("training", "validation"):
        key, loader = f"{section}.dataloader", get(config, f"{section}.dataloader")
        factor, workers = loader.prefetch_factor, loader.num_workers
        if factor is not None and not workers > 0 < factor:
            message = f"both it and {key}.num_workers = {workers} must be at least 1"
            yield Problem(f"{key}.prefetch_factor", message, (f"{key}.num_workers",))
    if config.score.enable and config.model.flavor in FLAVORS:
        for key, have, want in (
            ("training.dataset", config.training.dataset, "digits"),
            ("training.img_size", str(config.training.image_size), "8x8"),
            ("encoder.pixel_channels", config.encoder.pixel_channels, 1),
            ("model.flavor in pixel space", FLAVORS[config.model.flavor].pixel_space, True),
        ):
            if have != want:
                message = f"reads 8 x 8 digits: {key} must be {want}, not {have}"
                yield Problem("score.enable", message, (key,))
