"""What is wrong with a configuration, all of it, each with its key and the remedy."""

import os
from typing import Any

import torch

from torchtitan_flux.config.paths import locate, looks_local
from torchtitan_flux.config.resolve import image_size, resolve_model_args
from torchtitan_flux.model import FLAVORS

AC_MODES = ("none", "full")


def problems(config: Any) -> list[str]:
    """Every reason why this run cannot work; empty when there is none.

    Args:
        config: the merged JobConfig. Only paths that this run will read are looked at.
    """
    found = [*_unsupported(config), *_paths(config)]
    if config.model.flavor not in FLAVORS:
        found.append(
            f"model.flavor = {config.model.flavor!r} is unknown; known: {', '.join(FLAVORS)}"
        )
    elif not found:
        found += _fit(config)
    return found + _batches(config) + _evaluation(config)


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


def _batches(config: Any) -> list[str]:
    found = []
    world = int(os.environ.get("WORLD_SIZE", "1"))
    p, t = config.parallelism, config.training
    replicate, shard = p.data_parallel_replicate_degree, p.data_parallel_shard_degree
    if shard == -1 and replicate >= 1 and world % replicate == 0:
        shard = world // replicate
    if replicate < 1 or shard < 1 or replicate * shard != world:
        found.append(
            f"parallelism.data_parallel_replicate_degree = {replicate} times "
            f"data_parallel_shard_degree = {p.data_parallel_shard_degree} does not make the "
            f"{world} ranks that were started; -1 for the shard degree takes what is left"
        )
    elif t.global_batch_size > 0 and t.global_batch_size % (t.local_batch_size * world):
        found.append(
            f"training.global_batch_size = {t.global_batch_size} is not a multiple of "
            f"training.local_batch_size = {t.local_batch_size} times {world} ranks"
        )
    for key in ("local_batch_size", "steps"):
        if getattr(t, key) < 1:
            found.append(f"training.{key} = {getattr(t, key)} must be at least 1")
    for key in ("classifier_free_guidance_prob", "flip_prob"):
        if not 0 <= getattr(t, key) <= 1:
            found.append(f"training.{key} = {getattr(t, key)} is not a probability")
    if config.flow.logit_std <= 0:
        found.append(f"flow.logit_std = {config.flow.logit_std} must be positive")
    return found


def _evaluation(config: Any) -> list[str]:
    found = []
    v = config.validation
    if v.enable and v.steps < 1 and v.steps != -1:
        found.append(f"validation.steps = {v.steps} must be positive, or -1 for all")
    if v.enable and v.freq < 1:
        found.append(f"validation.freq = {v.freq} must be at least 1")
    if config.sampling.enable and not config.sampling.prompts:
        found.append("sampling.enable = true needs sampling.prompts, a list of captions")
    for section in ("sampling", "score"):
        if getattr(config, section).denoising_steps < 1:
            found.append(f"{section}.denoising_steps must be at least 1")
    if config.score.enable and config.training.dataset != "digits":
        found.append(
            'score.enable = true reads handwritten digits: it needs training.dataset = "digits"'
        )
    return found
