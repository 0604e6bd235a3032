"""Configuration -> loaders."""

from dataclasses import asdict
from typing import Any

from torchtitan_flux.config.resolve import image_size, resolve_model_args, time_density
from torchtitan_flux.data.loader import FluxDataLoader, ValidationLoader
from torchtitan_flux.data.order import Order
from torchtitan_flux.data.registry import build_source
from torchtitan_flux.data.samples import CaptionDropout, TrainingSamples, ValidationSamples
from torchtitan_flux.data.sources import Source
from torchtitan_flux.encoders.text import CaptionTokenizer
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.parallel.dims import FluxParallelDims


def image_channels(config: Any, args: FluxModelArgs) -> int:
    """Channels of the images that the codec takes."""
    return config.encoder.pixel_channels if args.pixel_space else 3


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: CaptionTokenizer, job_config: Any
) -> FluxDataLoader:
    """The training loader of one data rank (torchtitan's DataLoaderBuilder)."""
    training = job_config.training
    args = resolve_model_args(job_config)
    size = image_size(job_config)
    source = build_source(training.dataset, "train", training.dataset_path, image_size=size)
    samples = TrainingSamples(
        source=source,
        order=Order(job_config.debug.seed, len(source)),
        seed=job_config.debug.seed,
        size=size,
        geometry=args.geometry,
        channels=image_channels(job_config, args),
        tokenize=tokenizer,
        time_density=time_density(job_config),
        dropout=CaptionDropout(training.classifier_free_guidance_prob, training.caption_dropout),
        flip_prob=training.flip_prob,
        stochastic=not args.pixel_space,
    )
    return FluxDataLoader(
        samples,
        global_batch_size=global_batch_size(job_config, dp_world_size),
        local_batch_size=training.local_batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        **asdict(training.dataloader),
    )


def build_validation_loader(
    dims: FluxParallelDims, tokenizer: CaptionTokenizer, job_config: Any
) -> ValidationLoader:
    """The fixed held-out set, dealt to the data ranks."""
    validation, training = job_config.validation, job_config.training
    same = validation.dataset in ("", training.dataset)
    source = build_source(
        validation.dataset or training.dataset,
        "held_out",
        validation.dataset_path or (training.dataset_path if same else None),
        image_size=image_size(job_config),
    )
    return ValidationLoader(
        validation_samples(source, tokenizer, job_config),
        batch_size=validation.local_batch_size,
        dp_rank=dims.data_rank,
        dp_world_size=dims.data_degree,
        **asdict(validation.dataloader),
    )


def validation_samples(
    source: Source, tokenizer: CaptionTokenizer, job_config: Any
) -> ValidationSamples:
    """A source as validation reads it: centre crop, first caption, noise by item id."""
    args = resolve_model_args(job_config)
    return ValidationSamples(
        source=source,
        seed=job_config.validation.seed,
        size=image_size(job_config),
        geometry=args.geometry,
        channels=image_channels(job_config, args),
        tokenize=tokenizer,
        stochastic=not args.pixel_space,
    )


def global_batch_size(config: Any, dp_world_size: int) -> int:
    """Samples of one optimizer step over all ranks; unset: one microbatch a rank."""
    given = config.training.global_batch_size
    return given if given > 0 else config.training.local_batch_size * dp_world_size
