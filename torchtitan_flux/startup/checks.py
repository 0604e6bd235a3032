"""What is wrong with a configuration, all of it, each with its key and the remedy."""

import functools
import math
from importlib.util import find_spec
from pathlib import Path

import torch

from torchtitan_flux.checkpoint.folder import complete_steps
from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.schema import get
from torchtitan_flux.data.sources.registry import DATASETS
from torchtitan_flux.model import FLAVORS, FluxModel, FluxModelArgs
from torchtitan_flux.model.trainable import trainable
from torchtitan_flux.optimizers import OPTIMIZERS, WITH_BF16
from torchtitan_flux.parallel.card import card
from torchtitan_flux.parallel.low_precision_checks import low_precision_fit, low_precision_problems
from torchtitan_flux.parallel.mesh_checks import mesh_problems, model_problems
from torchtitan_flux.parallel.pipeline_plan import pipeline_fit, pipeline_problems
from torchtitan_flux.parallel.recomputation_checks import AC_MODES, recomputation_problems
from torchtitan_flux.paths import locate, looks_local
from torchtitan_flux.startup.encoder_checks import encoder_problems
from torchtitan_flux.startup.folder_checks import folder_problems
from torchtitan_flux.startup.loading_checks import going_on_problem, loading_problems
from torchtitan_flux.startup.model_args import (
    AUTO,
    configured_schedule,
    own_scheduler,
    resolve_model_args,
    sample_settings,
)
from torchtitan_flux.startup.number_checks import number_problems
from torchtitan_flux.tensor_files.hub_cache import why_absent
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.weights.load import open_for
from torchtitan_flux.weights.locations import find

ON_GPUS = (
    "training.enable_cpu_offload",
    "training.gc_debug",
    "profiling.enable_profiling",
    "profiling.enable_memory_snapshot",
)
"""Switches of what there is on GPUs alone."""


def problems(config: FluxJobConfig, training: bool = True, ranks: int = 1) -> list[str]:
    """Every reason why this run cannot work; empty when there is none.

    Args:
        config: the merged JobConfig. Only paths that this run will read are looked at.
        training: whether it will train; drawing and scoring need no data, no folder to write, and
            no mesh or batch that fits, and run where the training could not.
        ranks: of the run.
    """
    flavor = FLAVORS.get(config.model.flavor)
    found = _at_least(config)
    if config.model.name != "flux":
        found.append(f"model.name = {config.model.name!r}: this trainer trains 'flux'")
    if training:
        found += [*_unsupported(config), *folder_problems(config), *data_key_problems(config)]
    encoders = encoder_problems(config, flavor is not None and flavor.pixel_space)
    found += encoders
    low_precision = low_precision_problems(config) if training else []
    found += low_precision
    if flavor is None:
        known = ", ".join(FLAVORS)
        found.append(f"model.flavor = {config.model.flavor!r} is unknown; known: {known}")
    elif not encoders:
        found += _fit(config, training, not low_precision)
    if training and config.training.local_batch_size > 0:
        found += [*mesh_problems(config, ranks), *pipeline_problems(config)]
    if training:
        found += [
            *_checkpoints(config),
            *loading_problems(config),
            *recomputation_problems(config),
            *_evaluation(config),
        ]
    found += [*_schedule(config), *_compute_type(config)]
    named = {line.split(" = ")[0] for line in found}  # -inf is too small, and that is enough
    beyond = number_problems(config, training)
    return found + [line for line in beyond if line.split(" = ")[0] not in named]


def _unsupported(config: FluxJobConfig) -> list[str]:
    """Features that do not exist here yet, by name."""
    found = []
    p = config.parallelism
    if p.expert_parallel_degree != 1:
        found.append(
            f"parallelism.expert_parallel_degree = {p.expert_parallel_degree}: FLUX has no "
            "experts; set it to 1"
        )
    if config.activation_checkpoint.mode not in AC_MODES:
        found.append(
            f"activation_checkpoint.mode = {config.activation_checkpoint.mode!r} does not exist; "
            f"use one of {', '.join(AC_MODES)}"
        )
    if config.training.dtype not in ("float32", "bfloat16") or (
        config.training.dtype == "bfloat16" and config.optimizer.name not in WITH_BF16
    ):
        found.append(
            f"training.dtype = {config.training.dtype!r}: weights are kept in float32, or in "
            f"bfloat16 with optimizer.name = {' or '.join(WITH_BF16)}, which then round "
            "stochastically; the compute type is training.mixed_precision_param"
        )
    found += _averages(config)
    if config.training.train_only:
        names = parameter_names(config.model.flavor) if config.model.flavor in FLAVORS else []
        if names and not any(trainable(name, config.training.train_only) for name in names):
            found.append(
                f"training.train_only = {config.training.train_only} names no parameter; they are "
                f"called as {', '.join(names[:3])} …"
            )
        if p.pipeline_parallel_degree > 1:
            found.append(
                "training.train_only needs parallelism.pipeline_parallel_degree = 1: gradients "
                "would have to go through stages that have none"
            )
    kind = OPTIMIZERS.get(config.optimizer.name)
    torchao = kind is not None and (kind.torchao or config.training.dtype == "bfloat16")
    if torchao and find_spec("torchao") is None:
        found.append(
            f"optimizer.name = {config.optimizer.name!r} with training.dtype = "
            f'{config.training.dtype!r} needs torchao: pip install "torchtitan-flux[float8]"'
        )
    if config.optimizer.early_step_in_backward:
        found.append(
            "optimizer.early_step_in_backward = true cannot clip gradients; set it to false"
        )
    if config.checkpoint.initial_load_in_hf_quantized:
        found.append(
            "checkpoint.initial_load_in_hf_quantized = true: of quantised weights only scaled "
            "float8 is read, and without this key; set it to false"
        )
    if config.fault_tolerance.enable:
        found.append("fault_tolerance.enable = true is not supported; set it to false")
    if config.comm.mode != "default":
        found.append(
            f'comm.mode = {config.comm.mode!r} trains nothing; set it to "default" '
            "(scripts/plan.py tries meshes without ranks)"
        )
    if config.memory_estimation.enable:
        found.append(
            "memory_estimation.enable = true is not available; set it to false and use "
            "scripts/plan.py"
        )
    if config.optimizer.name not in OPTIMIZERS:
        found.append(
            f"optimizer.name = {config.optimizer.name!r} is not available; use one of "
            f"{', '.join(OPTIMIZERS)}"
        )
    if not torch.cuda.is_available():
        if config.checkpoint.async_mode == "async_with_pinned_mem":
            found.append('checkpoint.async_mode = "async_with_pinned_mem" needs a GPU; use "async"')
        found += [
            f"{key} = true needs a GPU; set it to false" for key in ON_GPUS if get(config, key)
        ]
    if config.metrics.enable_wandb and find_spec("wandb") is None:
        found.append(
            "metrics.enable_wandb = true, and wandb is not installed: pip install wandb, or set it "
            "to false"
        )
    found += _custom_import(config.experimental.custom_import)
    return found


def _averages(config: FluxJobConfig) -> list[str]:
    found, ema = [], config.ema
    if any(not 0 <= decay < 1 for decay in ema.decay):
        found.append(f"ema.decay = {ema.decay}: each has to be in [0, 1)")
    if len(set(ema.decay)) < len(ema.decay):
        found.append(f"ema.decay = {ema.decay}: the same one twice")
    if ema.use_for == "ema" and not ema.decay:
        found.append('ema.use_for = "ema" needs ema.decay, the decay of an average')
    return found


@functools.cache
def parameter_names(flavor: str) -> list[str]:
    """Names of a flavor's parameters."""
    with torch.device("meta"):
        return [name for name, _ in FluxModel(FLAVORS[flavor]).named_parameters()]


def _custom_import(module: str) -> list[str]:
    if not module:
        return []
    key = f"experimental.custom_import = {module!r}"
    try:
        there = find_spec(module) is not None
    except (ImportError, ValueError) as error:  # of what is above it
        return [f"{key} cannot be imported ({error})"]
    return [] if there else [f"{key} is no module that can be imported"]


def _checkpoints(config: FluxJobConfig) -> list[str]:
    found = []
    c = config.checkpoint
    if c.create_seed_checkpoint and not c.enable:
        found.append("checkpoint.create_seed_checkpoint = true needs checkpoint.enable = true")
    if c.enable and c.keep_latest_k == 1:
        found.append(
            "checkpoint.keep_latest_k = 1: keep at least 2, for the newest may turn out damaged; "
            "0 keeps all"
        )
    if c.enable and c.initial_load_path and locate(c.initial_load_path) is None:
        why = why_absent(c.initial_load_path)
        found.append(f"checkpoint.initial_load_path = {c.initial_load_path!r} {why}")
    found += _initial_kind(config)
    for key in ("initial_load_path", "initial_load_in_hf", "last_save_in_hf",
                "exclude_from_loading"):  # fmt: skip
        if getattr(c, key) and not c.enable:
            found.append(
                f"checkpoint.{key} is set, and nothing is loaded or saved: set checkpoint.enable = "
                "true (with checkpoint.load_only = true to save nothing), or remove the key"
            )
    if c.initial_load_in_hf and not c.initial_load_path:
        found.append(
            "checkpoint.initial_load_in_hf = true needs checkpoint.initial_load_path: a diffusers "
            "folder, or a safetensors file (model.hf_assets_path is not read)"
        )
    if c.initial_load_in_hf and not c.initial_load_model_only:
        found.append(
            "checkpoint.initial_load_in_hf = true: such files hold weights alone; set "
            "checkpoint.initial_load_model_only = true"
        )
    if c.last_save_in_hf and not c.last_save_model_only:
        found.append(
            "checkpoint.last_save_in_hf = true needs checkpoint.last_save_model_only = true; for a "
            "full last checkpoint, leave both false and run scripts/convert_checkpoint.py on it"
        )
    if c.last_save_in_hf and c.load_only:
        found.append(
            "checkpoint.last_save_in_hf = true saves, checkpoint.load_only = true does not"
        )
    return found


def _compute_type(config: FluxJobConfig) -> list[str]:
    key = "training.mixed_precision_param"
    if config.training.mixed_precision_param != "bfloat16" or torch.version.hip is not None:
        return []
    here = card()
    if here is None or here.capability >= (8, 0):
        return []
    return [
        f'{key} = "bfloat16" needs a GPU of compute capability 8.0 or later, and {here}; compute '
        f"in float32: --{key} float32"
    ]


def _schedule(config: FluxJobConfig) -> list[str]:
    try:
        configured_schedule(config)
    except ValueError as error:
        return [str(error)]
    return []


def _fit(config: FluxJobConfig, training: bool, low_precision: bool) -> list[str]:
    """Widths and sizes that do not fit each other.

    Args:
        config: one whose encoders are there.
        training: whether it will train.
        low_precision: whether the keys of 8-bit computation are sound.
    """
    try:
        args = resolve_model_args(config, training=training)
    except (ValueError, OSError) as error:
        return [str(error)]
    found = _size(config, args)
    if not training:
        return found
    times = [] if found else _grid_times(config, args)
    found += _initial_weights(config, args)
    fits = not found and low_precision
    return [
        *found,
        *times,
        *model_problems(config, args),
        *pipeline_fit(config, args),
        *(low_precision_fit(config, args, config.training.image_size) if fits else []),
    ]


def _initial_path(config: FluxJobConfig) -> Path | None:
    """What a run begins with; None where it begins with nothing that is there."""
    c = config.checkpoint
    if not (c.enable and c.initial_load_path):
        return None
    if complete_steps(Path(config.job.dump_folder) / c.folder):
        return None  # the run goes on from its own
    return locate(c.initial_load_path)


def _initial_kind(config: FluxJobConfig) -> list[str]:
    """Why a run cannot begin with what it is to begin with, whatever the model is."""
    path, c = _initial_path(config), config.checkpoint
    if path is None:
        return []
    key = f"checkpoint.initial_load_path = {c.initial_load_path!r}"
    if not c.initial_load_model_only:
        why = "" if c.initial_load_in_hf else going_on_problem(path)  # that is refused already
        return [f"{key} {why}"] if why else []
    try:
        find(path, "sizes")
    except (ValueError, OSError) as error:
        return [f"{key}: {error}"]
    return []


def _initial_weights(config: FluxJobConfig, args: FluxModelArgs) -> list[str]:
    """Why weights do not fit the model, by their headers."""
    path, c = _initial_path(config), config.checkpoint
    if path is None or not c.initial_load_model_only or _initial_kind(config):
        return []
    try:
        open_for(
            path, config.model.flavor, args, c.guidance_weights, c.unknown_weights, contents=False
        )
    except (ValueError, OSError) as error:
        return [f"checkpoint.initial_load_path = {c.initial_load_path!r}: {error}"]
    return []


def _size(config: FluxJobConfig, args: FluxModelArgs) -> list[str]:
    try:
        args.geometry.check(config.training.image_size)
    except ValueError as error:
        t = config.training
        key = "img_size" if not (t.img_height or t.img_width) else "img_height / img_width"
        return [f"training.{key}: {error}"]
    return []


def _grid_times(config: FluxJobConfig, args: FluxModelArgs) -> list[str]:
    """Whether there is a schedule for the pictures that are drawn while training.

    What states it has to be readable without any, too: it goes along with what is exported.
    """
    if config.sampling.denoising_steps < 1 or _schedule(config):
        return []
    of_weights = config.sampling.schedule == AUTO
    try:
        _ = own_scheduler(config) if of_weights else None
    except UnreadableWeights as error:
        return [
            f"checkpoint.initial_load_path: {error}; get it again, or say by sampling.schedule how "
            "is drawn"
        ]
    if not config.sampling.enable:
        return []
    try:
        sample_settings(config, args).times(args.geometry)
    except (ValueError, OSError) as error:
        key = "checkpoint.initial_load_path" if of_weights else "sampling.schedule"
        return [f"{key} with sampling.enable = true: {error}"]
    return []


MINIMA = {
    "training.local_batch_size": 1,
    "training.steps": 1,
    "training.gc_freq": 1,
    "training.img_height": 0,
    "training.img_width": 0,
    "training.dataloader.num_workers": 0,
    "validation.dataloader.num_workers": 0,
    "metrics.log_freq": 1,
    "lr_scheduler.warmup_steps": 0,
    "optimizer.lr": 0,
    "optimizer.eps": torch.finfo(torch.float32).tiny,  # or 0 / 0 where nothing has a gradient yet
    "optimizer.weight_decay": 0,
    "comm.init_timeout_seconds": 1,
    "comm.train_timeout_seconds": 1,
    "comm.trace_buf_size": 0,
    "training.max_nonfinite_steps": 1,
    "data.min_image_size": 1,
    "data.max_image_pixels": 1,
    "checkpoint.interval": 1,
    "checkpoint.keep_latest_k": 0,
    "checkpoint.load_step": -1,
    "encoder.max_t5_encoding_len": 1,
    "validation.local_batch_size": 1,
    "validation.freq": 1,
    "ema.every": 1,
    "ema.start": 0,
    "sampling.freq": 1,
    "sampling.images_per_prompt": 1,
    "sampling.denoising_steps": 1,
    "sampling.local_batch_size": 1,
    "score.count": 1,
    "score.denoising_steps": 1,
    "inference.local_batch_size": 1,
    "inference.img_size": 0,
}

PROBABILITIES = ("training.classifier_free_guidance_prob", "training.flip_prob")
BELOW_ONE = ("optimizer.beta1", "optimizer.beta2")
SCALES = (
    "flow.guidance",
    "sampling.guidance",
    "sampling.classifier_free_guidance_scale",
    "score.classifier_free_guidance_scale",
)
SHARES = ("lr_scheduler.decay_ratio", "lr_scheduler.min_lr_factor", "data.max_unreadable_share")


def _at_least(config: FluxJobConfig) -> list[str]:
    found = []
    for name, least in MINIMA.items():
        if get(config, name) < least:
            found.append(f"{name} = {get(config, name)} must be at least {least}")
    for name in PROBABILITIES:
        if not 0 <= get(config, name) <= 1:
            found.append(f"{name} = {get(config, name)} is not a probability")
    for name in BELOW_ONE:
        if not 0 <= get(config, name) < 1:
            found.append(f"{name} = {get(config, name)} is not in [0, 1)")
    for name in SCALES:
        value = get(config, name)
        if value is not None and not 0 <= value < math.inf:
            found.append(f"{name} = {value} must be a finite number, 0 or more")
    for name in SHARES:
        value = get(config, name)
        if value is not None and not 0 <= value <= 1:
            found.append(f"{name} = {value} is not in [0, 1]")
    if config.training.max_norm <= 0:
        found.append(f"training.max_norm = {config.training.max_norm} must be positive; inf is off")
    for section in ("training", "validation"):
        loader = get(config, section).dataloader
        if loader.prefetch_factor is not None and not (
            loader.num_workers > 0 < loader.prefetch_factor
        ):
            found.append(
                f"{section}.dataloader.prefetch_factor = {loader.prefetch_factor}: batches are "
                f"made ahead by {section}.dataloader.num_workers = {loader.num_workers} processes; "
                "both must be at least 1"
            )
    data = config.data
    if not 0 <= data.held_out_share < 1:
        found.append(f"data.held_out_share = {data.held_out_share} is not a share in [0, 1)")
    if len(data.background) != 3 or not all(0 <= value <= 255 for value in data.background):
        found.append(
            f"data.background = {data.background} is not a list of red, green, blue, 0 to 255"
        )
    if config.flow.logit_std <= 0:
        found.append(f"flow.logit_std = {config.flow.logit_std} must be positive")
    return found


def data_key_problems(config: FluxJobConfig) -> list[str]:
    """Data sets that do not exist here, or that would be read where nothing lies."""
    found = []
    t, v = config.training, config.validation
    sections = {"training": (t.dataset, t.dataset_path)}
    own = bool(v.dataset_path) or v.dataset not in ("", t.dataset)
    if v.enable and own:
        sections["validation"] = (v.dataset or t.dataset, v.dataset_path)
    for section, (name, path) in sections.items():
        if name not in DATASETS:
            found.append(
                f"{section}.dataset = {name!r} is not available; use one of {', '.join(DATASETS)}"
            )
        elif DATASETS[name].built_in and path is not None:
            found.append(f"{section}.dataset_path: {name!r} reads no files; remove the key")
        elif DATASETS[name].needs_path and not path:
            download = DATASETS[name].download
            found.append(
                f"{section}.dataset_path is not set: {name!r} needs the folder of its files"
                + (f"; download them with `{download}`" if download else "")
            )
        elif path and locate(path) is None and looks_local(path) and not set(path) & set("*?[{"):
            found.append(f"{section}.dataset_path = {path!r} does not exist")
    prefix = config.data.caption_prefix
    found += [
        f"data.caption_prefix = {prefix!r}: {section}.dataset = {name!r} makes its own captions; "
        "remove the key"
        for section, (name, _) in sections.items()
        if prefix and name in DATASETS and DATASETS[name].built_in
    ]
    named = DATASETS.get(t.dataset)
    if v.enable and not (own or config.data.held_out_share or not named or named.has_held_out):
        found.append(
            "validation.enable = true, and nothing is held out: set validation.dataset_path to "
            "other data, or data.held_out_share to the share of the training data to keep back"
        )
    return found


def _evaluation(config: FluxJobConfig) -> list[str]:
    found = []
    v, score = config.validation, config.score
    if v.enable and v.steps < 1 and v.steps != -1:
        found.append(f"validation.steps = {v.steps} must be positive, or -1 for all")
    if config.sampling.enable and not config.sampling.prompts:
        found.append("sampling.enable = true needs sampling.prompts, a list of captions")
    if score.enable and config.model.flavor in FLAVORS:
        reads = {
            "training.dataset": (config.training.dataset, "digits"),
            "training.img_size": (str(config.training.image_size), "8x8"),
            "encoder.pixel_channels": (config.encoder.pixel_channels, 1),
            "model.flavor in pixel space": (FLAVORS[config.model.flavor].pixel_space, True),
        }
        found += [
            f"score.enable = true reads 8 x 8 digits: {key} must be {want}, not {have}"
            for key, (have, want) in reads.items()
            if have != want
        ]
    return found
