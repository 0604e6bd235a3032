"""What is asked for on the command line of run_infer.sh: captions, settings, where pictures go."""

import argparse
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.tools.logging import logger

from torchtitan_flux.checkpoint.manifest import MANIFEST
from torchtitan_flux.checkpoint.storage import METADATA
from torchtitan_flux.config.command_line import given_keys
from torchtitan_flux.config.errors import ConfigError
from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.encoders.pretrained import PUBLISHED
from torchtitan_flux.inference.draw import Request
from torchtitan_flux.inference.option_checks import (
    MOST_PIXELS,
    RANGES,
    unknown_options,
    wrong_options,
)
from torchtitan_flux.inference.picture_settings import NoPicture, PictureSettings
from torchtitan_flux.inference.targets import SUFFIXES, targets
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.paths import locate
from torchtitan_flux.sampling.generate import SampleSettings
from torchtitan_flux.startup.model_args import AUTO, sample_guidance, sample_settings
from torchtitan_flux.tensor_files.hub_cache import snapshot_of
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.weights.scheduler import stated_scheduler

EXAMPLES = """examples:
  ./run_infer.sh --prompt "a handwritten seven" --out seven.png
  ./run_infer.sh --prompts prompts.txt --out pictures --steps 28 --cfg 2 --seed 3
  ./run_infer.sh --prompt "a handwritten seven" --count 4 --out sevens.webp
  ./run_infer.sh --from-png seven.png --out again.png

Any --section.key value of the configuration may follow; docs/inference.md tells more."""

PUBLISHED_GUIDANCE = 3.5
"""Guidance input that Black Forest Labs draw with."""
FRESH_SEED = -1
"""What --seed is where one is to be drawn."""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the rest: `--section.key value` of the configuration.

    A pipeline folder as `--weights` brings its encoders and autoencoder: the rest then names them.

    Raises:
        ConfigError: with all that is wrong: options that do not exist or cannot be, a picture that
            cannot be repeated.
    """
    parser = argparse.ArgumentParser(
        prog="run_infer.sh",
        description="Draw pictures with a trained model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="caption; may be repeated")
    add("--prompts", metavar="FILE", help="file with one caption a line")
    add(
        "--from-png",
        metavar="FILE",
        help="draw with the prompt and the settings of a picture of ours, PNG, JPEG or WebP",
    )
    add("--count", type=int, default=1, help="pictures of each prompt; the seed goes up by one")
    add(
        "--weights",
        metavar="PATH",
        help="draw with these instead of the run's checkpoint: a diffusers folder, BFL's or "
        "ComfyUI's safetensors file, or a checkpoint folder",
    )
    add(
        "--ema",
        metavar="DECAY",
        nargs="?",
        const="",
        help="draw with the average of the run's weights; its decay, where there are several",
    )
    add("--out", metavar="PATH", help=f"file ({SUFFIXES}) or folder")
    add("--overwrite", action="store_true", help="replace pictures that are there")
    add("--size", help="pixels: HEIGHTxWIDTH or one number")
    add("--steps", type=int, help="Euler steps")
    add("--cfg", type=float, help="scale of classifier-free guidance, 1 is off")
    add("--guidance", type=float, help="guidance input of flux-dev")
    add("--negative", metavar="CAPTION", help="caption to move away from, with --cfg")
    add("--seed", type=int, help="of the noise; -1 draws a fresh one")
    add(
        "--low_memory",
        "--low-memory",
        action="store_true",
        help="one part after another, blocks from CPU memory: the same pictures, slower",
    )
    options, rest = parser.parse_known_args(argv)
    known = [f"--{name.replace('_', '-')}" for name in vars(options)]
    options.own_weights = options.weights is not None
    options.given = {key for key, _ in given_keys(rest)}
    found = wrong_options(options) + unknown_options(sorted(options.given), known)
    options.recorded = None
    if options.from_png is not None and not found:
        try:
            options.recorded = PictureSettings.read(Path(options.from_png))
        except NoPicture as error:
            found.append(f"--from-png: {error}")
        found += _beside_from_png(options)
    if found:
        raise ConfigError(found)
    return options, rest if options.weights is None else with_parts_of(options.weights, rest)


PARTS = {key: folder for key, (folder, _) in PUBLISHED.items()} | {
    "encoder.autoencoder_path": "vae"
}
"""Configuration keys and where a diffusers pipeline folder keeps what they name."""


def with_parts_of(weights: str, rest: list[str]) -> list[str]:
    """`rest`, naming also the encoders beside the transformer of a pipeline folder.

    They outrank the configuration file, as they belong to the weights; what `rest` names itself
    outranks them.
    """
    root = locate(weights)
    with suppress(UnreadableWeights):  # said where they are opened
        root = root and snapshot_of(root)
    if root is None or not (root / "model_index.json").is_file():
        return rest
    given = {key for key, _ in given_keys(rest)}
    return rest + [
        word
        for key, folder in PARTS.items()
        if (root / folder).is_dir() and key not in given
        for word in (f"--{key}", str(root / folder))
    ]


def _beside_from_png(options: argparse.Namespace) -> list[str]:
    """Options that have no place beside --from-png, a line each."""
    wrong = [f"--{key}" for key in sorted(options.given) if key.startswith("sampling.")]
    if options.prompts or len(options.prompt) > 1:
        wrong.append("--prompts" if options.prompts else "more than one --prompt")
    if options.count > 1:
        wrong.append(f"--count {options.count}")
    return [
        f"{one}: --from-png draws one picture with its own settings; of these --prompt, "
        "--negative, --size, --steps, --cfg, --guidance and --seed can be changed"
        for one in wrong
    ]


@dataclass(frozen=True)
class Task:
    """What is to be drawn.

    Attributes:
        requests: each picture.
        settings: of all of them.
        negative: caption to move away from; empty without guidance.
        paths: where each goes.
        batch: pictures that a rank draws at once.
        overwrite: whether files may be there already.
    """

    requests: list[Request]
    settings: SampleSettings
    negative: str
    paths: list[Path]
    batch: int
    overwrite: bool = False


def task_of(options: argparse.Namespace, config: FluxJobConfig, args: FluxModelArgs) -> Task:
    """Everything that the command line asks for.

    Raises:
        FileNotFoundError: naming the file that does not exist.
        ValueError: naming the option that cannot be, and what can.
    """
    recorded: PictureSettings | None = options.recorded
    prompts = read_prompts(options, config)
    settings = settings_of(options, config, args)
    negative = options.negative
    if negative is None:
        negative = recorded.negative_prompt if recorded else ""
    if settings.cfg == 1.0 and options.negative:
        raise ValueError(
            "--negative needs classifier-free guidance, which is off: give --cfg a scale above 1 "
            "(FLUX.1-dev and schnell have no such guidance; their models do without)"
        )
    requests = [
        Request(prompt, recorded.index if recorded else index, again)
        for index, prompt in enumerate(prompts)
        for again in range(options.count)
    ]
    folder = Path(config.job.dump_folder) / config.inference.save_img_folder
    paths = targets(options, folder, requests)
    batch = config.inference.local_batch_size
    return Task(requests, settings, negative, paths, batch, options.overwrite)


def read_prompts(options: argparse.Namespace, config: FluxJobConfig) -> list[str]:
    """Captions from the command line, the picture to repeat, or the file that is named.

    Raises:
        FileNotFoundError: naming the file that does not exist.
        ValueError: when there is no caption at all.
    """
    if options.prompt:
        if options.prompts:
            raise ValueError("--prompt and --prompts: give captions in one way")
        return options.prompt
    if options.recorded is not None:
        return [options.recorded.prompt]
    name = options.prompts or config.inference.prompts_path
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
    recorded: PictureSettings | None = options.recorded
    given = options.weights if options.own_weights else None
    weights = None if given is None else locate(given) or Path(given)
    base = sample_settings(config, args, weights) if recorded is None else recorded.settings
    changes: dict[str, Any] = {}
    if options.size is not None:
        sides = options.size.lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() for side in sides):
            raise ValueError(f"--size {options.size}: give HEIGHTxWIDTH or one number of pixels")
        changes["size"] = ImageSize(int(sides[0]), int(sides[-1]))
    elif config.inference.img_size and recorded is None:
        changes["size"] = ImageSize.of(config.inference.img_size)
    if options.guidance is not None and not args.guidance_embed:
        raise ValueError(f"--guidance: model.flavor = {config.model.flavor!r} takes no guidance")
    for name in ("steps", "cfg", "guidance", "seed"):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    if recorded is None and options.own_weights and _published(options.weights):
        changes = _of_published(options, config, args) | changes
    if args.guidance_embed != (base.guidance is not None):  # another flavor than the picture's
        changes.setdefault("guidance", sample_guidance(config, args))
    settings = replace(base, **changes)
    source = "the configuration" if recorded is None else options.from_png
    for name in ("steps", "cfg", "guidance"):
        value = getattr(settings, name)
        if value is not None and not RANGES[name].holds(value):
            raise ValueError(f"--{name} {value} (by {source}): {RANGES[name].words}")
    given = f"--size {options.size}" if options.size is not None else f"--size (by {source})"
    if max(settings.size.height, settings.size.width) > MOST_PIXELS:
        raise ValueError(f"{given}: at most {MOST_PIXELS} pixels a side")
    try:
        args.geometry.check(settings.size)
    except ValueError as error:
        raise ValueError(f"{given}: {error}") from None
    settings.times(args.geometry)  # raises where the schedule has none
    asked = None if recorded or config.sampling.schedule != AUTO else weights
    if asked is not None and (stated := stated_scheduler(asked)):
        logger.info(f"Drawn with the schedule {settings.schedule}, as {stated.where} says")
    return settings


def _published(weights: str) -> bool:
    """Whether weights are another program's files, and no checkpoint of a training run."""
    path = locate(weights)
    return path is None or not any((path / name).is_file() for name in (METADATA, MANIFEST))


def _of_published(
    options: argparse.Namespace, config: FluxJobConfig, args: FluxModelArgs
) -> dict[str, float]:
    """FLUX.1's scales, where nothing else is given: it is distilled, and takes no --cfg."""
    found: dict[str, float] = {}
    if options.cfg is None and "sampling.classifier_free_guidance_scale" not in options.given:
        found["cfg"] = 1.0
    if args.guidance_embed and options.guidance is None and config.sampling.guidance is None:
        found["guidance"] = PUBLISHED_GUIDANCE
    if found:
        scales = ", ".join(f"--{name} {value}" for name, value in found.items())
        logger.info(f"{options.weights} is no checkpoint of a run: drawn with FLUX.1's {scales}")
    return found


def changed(options: argparse.Namespace, task: Task) -> list[str]:
    """What a repeated picture will not have of the one it is made from, an entry each."""
    recorded: PictureSettings | None = options.recorded
    if recorded is None:
        return []
    found = []
    for name in ("size", "steps", "cfg", "guidance", "seed"):
        now, then = getattr(task.settings, name), getattr(recorded.settings, name)
        if now != then:
            found.append(f"--{name} {now} (the picture: {then})")
    if task.requests[0].prompt != recorded.prompt:
        found.append(f"--prompt (the picture: {recorded.prompt!r})")
    if task.negative != recorded.negative_prompt:
        found.append(f"--negative (the picture: {recorded.negative_prompt!r})")
    return found
