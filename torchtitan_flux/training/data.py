"""Configuration -> sources, samples and loaders."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.tools.logging import logger

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import ConfigError, Problem
from torchtitan_flux.data.checks import data_key_problems
from torchtitan_flux.data.loader import FluxDataLoader, ValidationLoader
from torchtitan_flux.data.samples import (
    Tokenize,
    TrainingSamples,
    ValidationSamples,
)
from torchtitan_flux.data.sources.registry import build_source
from torchtitan_flux.data.sources.source import (
    PATH_KEY,
    Source,
    SourceOptions,
    Split,
    items_digest,
)
from torchtitan_flux.data.sources.split import whole_of
from torchtitan_flux.data.survey import refuse_unusable, survey
from torchtitan_flux.encoders.tokenizer import CaptionTokenizer
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.paths import resolved_path
from torchtitan_flux.startup.model_args import resolve_model_args, time_density


def open_source(config: FluxJobConfig, split: Split, unusable: bool = False) -> Source:
    """The source that [training] or [validation] names, read as [data] says.

    Validation reads the held-out part of the training data, or all of data of its own.

    Raises:
        ConfigError: the data are not there, cannot be read or, unless `unusable` ones are wanted,
            cannot be trained on; names the key.
    """
    data, training, validation = config.data, config.training, config.validation
    name, path, share = training.dataset, training.dataset_path, data.held_out_share
    own = bool(validation.dataset_path) or validation.dataset not in ("", name)
    if split == "held_out" and own:
        name, path, share = validation.dataset or name, validation.dataset_path, 0.0
    options = SourceOptions(
        path=None if path is None else resolved_path(path),
        image_size=training.image_size,
        index_folder=Path(data.index_folder) if data.index_folder else None,
        image_column=data.image_column,
        caption_column=data.caption_column,
        captions_by_line=data.captions == "lines",
        default_caption=data.default_caption,
        caption_prefix=data.caption_prefix,
        validates_training_data=split == "held_out" and not own,
        held_out_share=share,
        min_size=data.min_image_size,
        max_pixels=data.max_image_pixels,
    )
    try:
        source = build_source(name, split, options)
        if not unusable:
            refuse_unusable(source, data.max_unreadable_share, PATH_KEY[split])
        return source
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def data_problems(config: FluxJobConfig) -> list[Problem]:
    """What is wrong with the data themselves, a line each; indexes them, which can take long.

    Data are not opened where the keys that name them are wrong.
    """
    wrong, found = {problem.key for problem in data_key_problems(config)}, []
    splits: tuple[Split, ...] = ("train", "held_out") if config.validation.enable else ("train",)
    for split in splits:
        if {PATH_KEY[split], PATH_KEY[split].removesuffix("_path")} & wrong:
            continue
        try:
            open_source(config, split)
        except ConfigError as error:
            found += error.problems
    return list(dict.fromkeys(found))  # of one data set, both parts say the same


def log_surveys(
    sources: Mapping[str, Source], size: ImageSize, tokenizer: CaptionTokenizer
) -> None:
    """Log what data sets hold, by what each is for; two parts of one are one table."""
    used_for: dict[str, list[str]] = {}
    for name, source in sources.items():
        used_for.setdefault(items_digest(whole_of(source)), []).append(name)
    for names in used_for.values():
        title, *rest = survey(sources[names[-1]], size, tokenizer.cut).lines()
        for line in (f"Data of {' and '.join(names)}: {title}", *rest):
            logger.info(line)


def _sample_options(config: FluxJobConfig, args: FluxModelArgs) -> dict[str, Any]:
    """What training and validation samples have in common."""
    red, green, blue = config.data.background
    return {
        "size": config.training.image_size,
        "geometry": args.geometry,
        "channels": config.encoder.pixel_channels if args.pixel_space else 3,
        "background": (red, green, blue),
        "min_size": config.data.min_image_size,
        "srgb": config.data.color_profiles == "srgb",
        "stochastic": not args.pixel_space,
    }


def training_samples(
    source: Source, tokenize: Tokenize, config: FluxJobConfig, args: FluxModelArgs, seed: int
) -> TrainingSamples:
    """A source as training reads it, from any position of the run."""
    training = config.training
    return TrainingSamples(
        source=source,
        seed=seed,
        tokenize=tokenize,
        time_density=time_density(config),
        dropout_prob=training.classifier_free_guidance_prob,
        dropout_mode=training.caption_dropout,
        flip_prob=training.flip_prob,
        **_sample_options(config, args),
    )


def validation_samples(
    source: Source, tokenizer: CaptionTokenizer, config: FluxJobConfig
) -> ValidationSamples:
    """A source as validation reads it: centre crop, first caption, noise by item id."""
    return ValidationSamples(
        source=source,
        seed=config.validation.seed,
        tokenize=tokenizer,
        **_sample_options(config, resolve_model_args(config)),
    )


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: CaptionTokenizer, job_config: FluxJobConfig
) -> FluxDataLoader:
    """The training loader of one data rank (torchtitan's DataLoaderBuilder)."""
    training, seed = job_config.training, job_config.debug.seed
    assert seed is not None, "FluxTrainer resolves debug.seed before it builds the loader"
    source, args = open_source(job_config, "train"), resolve_model_args(job_config)
    return FluxDataLoader(
        training_samples(source, tokenizer, job_config, args, seed),
        global_batch_size(job_config, dp_world_size),
        training.local_batch_size,
        dp_rank,
        dp_world_size,
        **asdict(training.dataloader),
    )


def build_validation_loader(
    dims: FluxParallelDims, tokenizer: CaptionTokenizer, config: FluxJobConfig
) -> ValidationLoader:
    """The fixed held-out set, dealt to the data ranks."""
    return ValidationLoader(
        validation_samples(open_source(config, "held_out"), tokenizer, config),
        config.validation.local_batch_size,
        dims.data_rank,
        dims.data_degree,
        **asdict(config.validation.dataloader),
    )


def global_batch_size(config: FluxJobConfig, dp_world_size: int) -> int:
    """Samples of one optimizer step over all ranks; unset: one microbatch a rank."""
    given = config.training.global_batch_size
    return given if given > 0 else config.training.local_batch_size * dp_world_size
