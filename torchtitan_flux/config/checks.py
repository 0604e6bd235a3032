"""What is wrong with a configuration, all of it, each with its key and the remedy."""

import os
from typing import Any

import torch

from torchtitan_flux.config.paths import locate, looks_local
from torchtitan_flux.config.resolve import image_size, resolve_model_args
from torchtitan_flux.data.registry import SOURCES
from torchtitan_flux.model import FLAVORS

AC_MODES = ("none", "full")


def problems(config: Any, training: bool = True) -> list[str]:
    """Every reason why this run cannot work; empty when there is none.

    Args:
        config: the merged JobConfig. Only paths that this run will read are looked at.
        training: whether it will train; drawing and scoring need no mesh or batch that fits.
    """
    found = [*_unsupported(config), *_paths(config), *_at_least(config), *_data(config)]
    if config.model.flavor not in FLAVORS:
        known = ", ".join(FLAVORS)
        found.append(f"model.flavor = {config.model.flavor!r} is unknown; known: {known}")
    elif not found:
        found += _fit(config)
    if training and config.training.local_batch_size > 0:
        found += _batches(config)
    return found + _evaluation(config)


def _unsupported(config: Any) -> list[str]:
    """Features that do not exist here yet, by name."""
    found = []
    p = config.parallelism
    for key, what in (
        ("tensor_parallel_degree", "tensor"),
        ("context_parallel_degree", "context"),
        ("pipeline_parallel_degree", "pipeline"),
        ("expert_parallel_degree", "expert"),
    ):
        if getattr(p, key) != 1:
            found.append(
                f"parallelism.{key} = {getattr(p, key)}: {what} parallelism is not available yet; "
                f"set it to 1 and use data_parallel_shard_degree / data_parallel_replicate_degree"
            )
    if config.model.name != "flux":
        found.append(f"model.name = {config.model.name!r}: this trainer trains 'flux'")
    if config.activation_checkpoint.mode not in AC_MODES:
        found.append(
            f"activation_checkpoint.mode = {config.activation_checkpoint.mode!r} is not available "
            f"yet; use one of {', '.join(AC_MODES)}"
        )
    if config.model.converters:
        found.append(
            f"model.converters = {config.model.converters}: low precision is not available yet; "
            "remove the key"
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
    if config.checkpoint.create_seed_checkpoint:
        found.append(
            "checkpoint.create_seed_checkpoint = true is not needed: initial values are the same "
            "on every mesh; set debug.seed and remove it"
        )
    if config.fault_tolerance.enable:
        found.append("fault_tolerance.enable = true is not supported; set it to false")
    if not torch.cuda.is_available():
        if config.training.enable_cpu_offload:
            found.append("training.enable_cpu_offload = true needs a GPU; set it to false")
        if config.checkpoint.async_mode == "async_with_pinned_mem":
            found.append('checkpoint.async_mode = "async_with_pinned_mem" needs a GPU; use "async"')
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


def _fit(config: Any) -> list[str]:
    """Widths and sizes that do not fit each other."""
    try:
        args = resolve_model_args(config)
        args.geometry.check(image_size(config))
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


MINIMA = {
    "training.local_batch_size": 1,
    "training.steps": 1,
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
    if config.flow.logit_std <= 0:
        found.append(f"flow.logit_std = {config.flow.logit_std} must be positive")
    return found


def _data(config: Any) -> list[str]:
    """Data sets that do not exist here."""
    found = []
    sections = ["training"] + ["validation"] * config.validation.enable
    for section in sections:
        name = getattr(config, section).dataset
        if name not in SOURCES and not (section == "validation" and name == ""):
            found.append(
                f"{section}.dataset = {name!r} is not available; use one of {', '.join(SOURCES)}"
            )
        if getattr(config, section).dataset_path is not None:
            found.append(f"{section}.dataset_path: {name!r} reads no files; remove the key")
    return found


def _batches(config: Any) -> list[str]:
    """Degrees and batch sizes that do not make the ranks that were started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    p, t = config.parallelism, config.training
    replicate, shard = p.data_parallel_replicate_degree, p.data_parallel_shard_degree
    if shard == -1 and replicate >= 1 and world % replicate == 0:
        shard = world // replicate
    if replicate < 1 or shard < 1 or replicate * shard != world:
        return [
            f"parallelism.data_parallel_replicate_degree = {replicate} times "
            f"data_parallel_shard_degree = {p.data_parallel_shard_degree} does not make the "
            f"{world} ranks that were started; -1 for the shard degree takes what is left"
        ]
    size = t.global_batch_size
    if size != -1 and (size < 1 or size % (t.local_batch_size * world)):
        return [
            f"training.global_batch_size = {size} is not a multiple of "
            f"training.local_batch_size = {t.local_batch_size} times {world} ranks"
        ]
    return []


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
