"""The pictures that are asked for: captions and settings, from options and configuration."""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.tools.logging import logger

from torchtitan_flux.checkpoint.manifest import MANIFEST
from torchtitan_flux.checkpoint.storage import METADATA
from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.encoders.tokenizer import CaptionTokenizer
from torchtitan_flux.inference.options import out_of_range
from torchtitan_flux.inference.picture import Picture
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.paths import locate
from torchtitan_flux.sampling.generate import SampleSettings
from torchtitan_flux.startup.model_args import AUTO, sample_guidance, sample_settings
from torchtitan_flux.weights.scheduler import stated_scheduler

SHOWN, LETTERS = 8, 60
"""Captions that are named when they are cut, and how much of them."""
PUBLISHED_GUIDANCE = 3.5
"""Guidance input that Black Forest Labs draw with."""


def requested(
    options: argparse.Namespace, config: FluxJobConfig, args: FluxModelArgs
) -> list[Picture]:
    """All pictures that are asked for; ValueError, FileNotFoundError name the option.

    Their size, steps, scales and negative prompt are the same.
    """
    recorded: Picture | None = options.recorded
    prompts = read_prompts(options, config.inference.prompts_path)
    settings = settings_of(options, config, args)
    if settings.cfg == 1.0 and options.negative:
        raise ValueError(
            "--negative needs classifier-free guidance, which is off: give --cfg a scale above 1 "
            "(FLUX.1-dev and schnell have no such guidance; their models do without)"
        )
    negative = options.negative
    if negative is None:
        negative = recorded.negative_prompt if recorded else ""
    return [
        Picture(
            prompt,
            negative,
            replace(settings, seed=settings.seed + repeat),
            recorded.index if recorded else index,
        )
        for index, prompt in enumerate(prompts)
        for repeat in range(options.count)
    ]


def read_prompts(options: argparse.Namespace, default: str) -> list[str]:
    """Captions from the command line, the picture to repeat, or the file that is named."""
    if options.prompt:
        if options.prompts:
            raise ValueError("--prompt and --prompts: give captions in one way")
        return options.prompt
    if options.recorded is not None:
        return [options.recorded.prompt]
    name = options.prompts or default
    path = locate(name)
    if path is None:
        raise FileNotFoundError(f"{name} does not exist; give --prompt or --prompts FILE")
    try:
        # a mark at the beginning is no part of the caption, and nothing else ends a line
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no text file in UTF-8 ({error})") from None
    if not any(lines):
        raise ValueError(f"{path} holds no caption")
    return [line for line in lines if line]


def settings_of(
    options: argparse.Namespace, config: FluxJobConfig, args: FluxModelArgs
) -> SampleSettings:
    """The run's own settings, or the picture's, changed where the command line says so.

    Published weights have settings of their own, for those of the run are of its training.
    """
    given: dict[str, Any] = {
        name: value
        for name in ("steps", "cfg", "guidance", "seed")
        if (value := getattr(options, name)) is not None
    }
    if "guidance" in given and not args.guidance_embed:
        raise ValueError(f"--guidance: model.flavor = {config.model.flavor!r} takes no guidance")
    if options.size is not None:
        sides = options.size.lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() for side in sides):
            raise ValueError(f"--size {options.size}: give HEIGHTxWIDTH or one number of pixels")
        given["size"] = ImageSize(int(sides[0]), int(sides[-1]))
    if options.recorded is not None:
        base, source = options.recorded.settings, options.from_png
    else:
        weights = options.weights and (locate(options.weights) or Path(options.weights))
        base, source = sample_settings(config, args, weights), "the configuration"
        if config.inference.img_size:
            base = replace(base, size=ImageSize.of(config.inference.img_size))
        if weights and not any((weights / name).is_file() for name in (METADATA, MANIFEST)):
            given = _of_published(options, config, args) | given
        if weights and config.sampling.schedule == AUTO and (stated := stated_scheduler(weights)):
            logger.info(f"Drawn with the schedule {base.schedule}, as {stated.where} says")
    if args.guidance_embed != (base.guidance is not None):  # another flavor than the picture's
        given.setdefault("guidance", sample_guidance(config, args))
    settings = replace(base, **given)
    for name in ("steps", "cfg", "guidance"):
        if wrong := out_of_range(name, getattr(settings, name)):
            raise ValueError(f"--{name} {getattr(settings, name)} (by {source}): {wrong}")
    try:
        args.geometry.check(settings.size)
    except ValueError as error:
        size = options.size if options.size is not None else f"{settings.size} (by {source})"
        raise ValueError(f"--size {size}: {error}") from None
    settings.times(args.geometry)  # raises where the schedule has none
    return settings


def _of_published(
    options: argparse.Namespace, config: FluxJobConfig, args: FluxModelArgs
) -> dict[str, float]:
    """FLUX.1's scales, where nothing else is given: it is distilled, and takes no --cfg."""
    scales: dict[str, float] = {}
    if options.cfg is None and "sampling.classifier_free_guidance_scale" not in options.given:
        scales["cfg"] = 1.0
    if args.guidance_embed and options.guidance is None and config.sampling.guidance is None:
        scales["guidance"] = PUBLISHED_GUIDANCE
    if scales:
        shown = ", ".join(f"--{name} {value}" for name, value in scales.items())
        logger.info(f"{options.weights} is no checkpoint of a run: drawn with FLUX.1's {shown}")
    return scales


def cut_captions(captions: Iterable[str], tokenizer: CaptionTokenizer) -> Iterator[str]:
    """A line for each caption and encoder that does not read all of it; of many, the first ones."""
    cut = 0
    for caption in dict.fromkeys(captions):
        found = tokenizer.unread(caption)
        cut += bool(found)
        for one in found if cut <= SHOWN else ():
            key = " (encoder.max_t5_encoding_len)" if one.encoder == "T5" else ""
            yield (
                f"{_shortened(caption)} is cut for {one.encoder}: it has {one.tokens} tokens, "
                f"{one.limit} are read{key}; not read: {_shortened(one.text)}"
            )
    if cut > SHOWN:
        yield f"{cut - SHOWN} more captions are cut"


def _shortened(text: str) -> str:
    return repr(text if len(text) <= LETTERS else f"{text[:LETTERS]}…")
