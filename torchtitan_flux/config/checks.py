"""What is wrong with a configuration, all of it, each with its key and the remedy."""

from typing import Any

import torch

from torchtitan_flux.config.low_precision import low_precision_fit, low_precision_problems
from torchtitan_flux.config.meshes import mesh_problems, model_problems
from torchtitan_flux.config.paths import locate, looks_local
from torchtitan_flux.config.pipeline import pipeline_fit, pipeline_problems
from torchtitan_flux.config.resolve import compiles, image_size, resolve_model_args
from torchtitan_flux.data.registry import (
    BUILT_IN,
    DOWNLOADS,
    NEED_PATH,
    SOURCES,
    WITHOUT_HELD_OUT,
)
from torchtitan_flux.model import FLAVORS

AC_MODES = ("none", "full", "selective", "memory_budget")
COMPILED = ("model", "loss")


def problems(config: Any, training: bool = True) -> list[str]:
    """Every reason why this run cannot work; empty when there is none.

    Args:
        config: the merged JobConfig. Only paths that this run will read are looked at.
        training: whether it will train; drawing and scoring need no mesh or batch that fits.
    """
    found = [*_unsupported(config), *_paths(config), *_at_least(config), *_data(config)]
    if training:
        found += low_precision_problems(config)
    if config.model.flavor not in FLAVORS:
        known = ", ".join(FLAVORS)
        found.append(f"model.flavor = {config.model.flavor!r} is unknown; known: {known}")
    elif not found:
        found += _fit(config, training)
    if training and config.training.local_batch_size > 0:
        found += [*mesh_problems(config), *pipeline_problems(config)]
    if training:
        found += [*_checkpoints(config), *_recomputation(config)]
    return found + _evaluation(config)


def _unsupported(config: Any) -> list[str]:
    """Features that do not exist here yet, by name."""
    found = []
    p = config.parallelism
    if p.expert_parallel_degree != 1:
        found.append(
            f"parallelism.expert_parallel_degree = {p.expert_parallel_degree}: FLUX has no "
            "experts; set it to 1"
        )
    if config.model.name != "flux":
        found.append(f"model.name = {config.model.name!r}: this trainer trains 'flux'")
    if config.activation_checkpoint.mode not in AC_MODES:
        found.append(
            f"activation_checkpoint.mode = {config.activation_checkpoint.mode!r} does not exist; "
            f"use one of {', '.join(AC_MODES)}"
        )
    if config.training.dtype != "float32":
        found.append(
            f"training.dtype = {config.training.dtype!r}: parameters are kept in float32; choose "
            "the compute type by training.mixed_precision_param"
        )
    if config.optimizer.early_step_in_backward:
        found.append(
            "optimizer.early_step_in_backward = true cannot clip gradients; set it to false"
        )
    if config.checkpoint.initial_load_in_hf or config.checkpoint.last_save_in_hf:
        found.append(
            "checkpoint.initial_load_in_hf / last_save_in_hf: Hugging Face folders are not "
            "available yet; the key maps are in torchtitan_flux.checkpoint"
        )
    if config.fault_tolerance.enable:
        found.append("fault_tolerance.enable = true is not supported; set it to false")
    if not torch.cuda.is_available():
        if config.training.enable_cpu_offload:
            found.append("training.enable_cpu_offload = true needs a GPU; set it to false")
        if config.checkpoint.async_mode == "async_with_pinned_mem":
            found.append('checkpoint.async_mode = "async_with_pinned_mem" needs a GPU; use "async"')
    return found


def _checkpoints(config: Any) -> list[str]:
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
        found.append(f"checkpoint.initial_load_path = {c.initial_load_path!r} does not exist")
    return found


def _recomputation(config: Any) -> list[str]:
    """Sections [activation_checkpoint] and [compile]."""
    found = []
    ac, compiling = config.activation_checkpoint, config.compile
    section = "activation_checkpoint"
    option = ac.selective_ac_option
    by_number = option.isdecimal() and int(option) > 0
    if ac.mode == "selective" and option != "op" and not by_number:
        found.append(
            f'{section}.selective_ac_option = {option!r}: use "op", or a number N >= 1 in quotes '
            "to recompute every N-th block"
        )
    if ac.mode == "memory_budget" and not compiles(config, "model"):
        found.append(
            f'{section}.mode = "memory_budget" is a choice of the compiler: set compile.enable = '
            'true with "model" in compile.components, or use another mode'
        )
    if ac.mode == "memory_budget" and not 0 <= ac.memory_budget <= 1:
        found.append(f"{section}.memory_budget = {ac.memory_budget} is not in [0, 1]")
    if ac.mode == "memory_budget" and config.parallelism.tensor_parallel_degree > 1:
        found.append(
            f'{section}.mode = "memory_budget": the compiler cannot size the graphs of tensor '
            'parallelism; use mode = "selective", or set parallelism.tensor_parallel_degree = 1'
        )
    if ac.offload_inputs and not (ac.mode == "full" or (ac.mode == "selective" and by_number)):
        found.append(
            f"{section}.offload_inputs = true is about blocks that are recomputed as a whole: set "
            f'{section}.mode = "full", or "selective" with a number, or offload_inputs = false'
        )
    if ac.determinism_check not in ("default", "none"):
        found.append(
            f'{section}.determinism_check = {ac.determinism_check!r}: use "default" or "none"'
        )
    if ac.debug and ac.mode == "selective" and option == "op":
        found.append(
            f'{section}.debug = true does not go with selective_ac_option = "op"; set one of them '
            "otherwise"
        )
    if ac.visualize_memory_budget_pareto:
        found.append(
            f"{section}.visualize_memory_budget_pareto = true is not available; remove the key"
        )
    unknown = [name for name in compiling.components if name not in COMPILED]
    if compiling.enable and unknown:
        found.append(f"compile.components names {', '.join(unknown)}; known: {', '.join(COMPILED)}")
    return found


def _paths(config: Any) -> list[str]:
    found = []
    keys = ["t5_encoder", "clip_encoder"]
    flavor = FLAVORS.get(config.model.flavor)
    if flavor is None or not flavor.pixel_space:
        keys.append("autoencoder_path")
    for key in keys:
        path = getattr(config.encoder, key)
        if locate(path) is None and (key == "autoencoder_path" or looks_local(path)):
            found.append(f"encoder.{key} = {path!r} does not exist")
    return found


def _fit(config: Any, training: bool) -> list[str]:
    """Widths and sizes that do not fit each other."""
    try:
        args = resolve_model_args(config)
        args.geometry.check(image_size(config))
    except (ValueError, OSError) as error:
        return [str(error)]
    if not training:
        return []
    return [
        *model_problems(config, args),
        *pipeline_fit(config, args),
        *low_precision_fit(config, args, image_size(config)),
    ]


MINIMA = {
    "training.local_batch_size": 1,
    "training.steps": 1,
    "training.max_nonfinite_steps": 1,
    "data.min_image_size": 1,
    "data.max_image_pixels": 1,
    "checkpoint.interval": 1,
    "checkpoint.keep_latest_k": 0,
    "checkpoint.load_step": -1,
    "encoder.max_t5_encoding_len": 1,
    "validation.local_batch_size": 1,
    "validation.freq": 1,
    "sampling.freq": 1,
    "sampling.images_per_prompt": 1,
    "sampling.denoising_steps": 1,
    "sampling.local_batch_size": 1,
    "score.count": 1,
    "score.denoising_steps": 1,
    "inference.local_batch_size": 1,
    "inference.img_size": 0,
}


def _at_least(config: Any) -> list[str]:
    found = []
    for name, least in MINIMA.items():
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        if value < least:
            found.append(f"{name} = {value} must be at least {least}")
    for key in ("classifier_free_guidance_prob", "flip_prob"):
        value = getattr(config.training, key)
        if not 0 <= value <= 1:
            found.append(f"training.{key} = {value} is not a probability")
    data = config.data
    if not 0 <= data.held_out_share < 1:
        found.append(f"data.held_out_share = {data.held_out_share} is not a share in [0, 1)")
    if not 0 <= data.max_unreadable_share <= 1:
        found.append(f"data.max_unreadable_share = {data.max_unreadable_share} is not in [0, 1]")
    if len(data.background) != 3 or not all(0 <= value <= 255 for value in data.background):
        found.append(
            f"data.background = {data.background} is not a list of red, green, blue, 0 to 255"
        )
    if config.flow.logit_std <= 0:
        found.append(f"flow.logit_std = {config.flow.logit_std} must be positive")
    return found


def _data(config: Any) -> list[str]:
    """Data sets that do not exist here, or that would be read where nothing lies."""
    found = []
    t, v = config.training, config.validation
    sections = {"training": (t.dataset, t.dataset_path)}
    own = bool(v.dataset_path) or v.dataset not in ("", t.dataset)
    if v.enable and own:
        sections["validation"] = (v.dataset or t.dataset, v.dataset_path)
    for section, (name, path) in sections.items():
        if name not in SOURCES:
            found.append(
                f"{section}.dataset = {name!r} is not available; use one of {', '.join(SOURCES)}"
            )
        elif name in BUILT_IN and path is not None:
            found.append(f"{section}.dataset_path: {name!r} reads no files; remove the key")
        elif name in NEED_PATH and not path:
            found.append(
                f"{section}.dataset_path is not set: {name!r} needs the folder of its files"
                + (f"; download them with `{DOWNLOADS[name]}`" if name in DOWNLOADS else "")
            )
        elif path and locate(path) is None and looks_local(path) and not set(path) & set("*?[{"):
            found.append(f"{section}.dataset_path = {path!r} does not exist")
    if v.enable and not own and t.dataset in WITHOUT_HELD_OUT and not config.data.held_out_share:
        found.append(
            "validation.enable = true, and nothing is held out: set validation.dataset_path to "
            "other data, or data.held_out_share to the share of the training data to keep back"
        )
    return found


def _evaluation(config: Any) -> list[str]:
    found = []
    v, score = config.validation, config.score
    if v.enable and v.steps < 1 and v.steps != -1:
        found.append(f"validation.steps = {v.steps} must be positive, or -1 for all")
    if config.sampling.enable and not config.sampling.prompts:
        found.append("sampling.enable = true needs sampling.prompts, a list of captions")
    if score.enable and config.model.flavor in FLAVORS:
        reads = {
            "training.dataset": (config.training.dataset, "digits"),
            "training.img_size": (str(image_size(config)), "8x8"),
            "encoder.pixel_channels": (config.encoder.pixel_channels, 1),
            "model.flavor in pixel space": (FLAVORS[config.model.flavor].pixel_space, True),
        }
        found += [
            f"score.enable = true reads 8 x 8 digits: {key} must be {want}, not {have}"
            for key, (have, want) in reads.items()
            if have != want
        ]
    return found
