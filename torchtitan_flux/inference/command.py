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
from torchtitan_flux.inference.draw import Request
from torchtitan_flux.inference.option_checks import (
    MOST_PIXELS,
    RANGES,
    unknown_options,
    wrong_options,
)
from torchtitan_flux.inference.picture_file import NoPicture, Recorded
from torchtitan_flux.inference.targets import SUFFIXES, targets
from torchtitan_flux.inference.trust import foreign_files
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.paths import locate
from torchtitan_flux.sampling.generate import SampleSettings
from torchtitan_flux.startup.load_config import read_config
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

    A pipeline folder as `--weights` brings its encoders and autoencoder, a picture as `--from-png`
    all that it was drawn with: the rest then names them.

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
        help="draw a picture of ours again, PNG, JPEG or WebP, from what it says",
    )
    add(
        "--trust",
        action="store_true",
        help="with --from-png: open the files that it names, whoever it comes from",
    )
    add("--count", type=int, default=1, help="pictures of each prompt; the seed goes up by one")
    add(
        "--weights",
        metavar="PATH",
        help="draw with these instead of the run's checkpoint: a diffusers folder, BFL's or "
        "ComfyUI's safetensors file, or a checkpoint folder",
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
        help="one part after another, blocks streamed from CPU memory: the same pictures, slower",
    )
    add("--estimate", action="store_true", help="print what memory it takes, and draw nothing")
    add(
        "--memory",
        type=float,
        metavar="GIB",
        help="with --estimate: for a card with so much free, instead of this machine",
    )
    options, rest = parser.parse_known_args(argv)
    known = [f"--{name.replace('_', '-')}" for name in vars(options)]
    options.recorded, options.outranked, options.trusted = None, [], []
    options.own_weights = options.weights is not None
    options.given = {key for key, _ in given_keys(rest)}
    if found := wrong_options(options) + unknown_options(sorted(options.given), known):
        raise ConfigError(found)
    if options.from_png is not None:
        rest = _as_recorded(options, rest)
    return options, rest if options.weights is None else with_parts_of(options.weights, rest)


PARTS = {"t5_encoder": "text_encoder_2", "clip_encoder": "text_encoder", "autoencoder_path": "vae"}
"""Keys of [encoder] and where a diffusers pipeline folder keeps them."""


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
        if (root / folder).is_dir() and f"encoder.{key}" not in given
        for word in (f"--encoder.{key}", str(root / folder))
    ]


def _as_recorded(options: argparse.Namespace, rest: list[str]) -> list[str]:
    """`rest` with the configuration that a picture was drawn with; what `rest` names outranks it.

    Raises:
        ConfigError: the file holds no settings, or options have no place beside it.
    """
    try:
        recorded = options.recorded = Recorded.read(Path(options.from_png))
    except NoPicture as error:
        raise ConfigError([f"--from-png: {error}"]) from None
    given = options.given
    wrong = [f"--{key}" for key in sorted(given) if key.startswith("sampling.")]
    if options.prompts or len(options.prompt) > 1:
        wrong.append("--prompts" if options.prompts else "more than one --prompt")
    if options.count > 1:
        wrong.append(f"--count {options.count}")
    if wrong:
        raise ConfigError(
            [
                f"{one}: --from-png draws one picture with its own settings; of these --prompt, "
                "--negative, --size, --steps, --cfg, --guidance and --seed can be changed"
                for one in wrong
            ]
        )
    _check_trust(options, rest)
    if not options.own_weights:
        options.weights = recorded.weights.path
    size = recorded.settings.size
    keys = {
        "model.flavor": recorded.flavor,
        "training.mixed_precision_param": recorded.dtype,
        "training.img_height": size.height,
        "training.img_width": size.width,
        "encoder.t5_encoder": recorded.t5.path,
        "encoder.clip_encoder": recorded.clip.path,
        "encoder.max_t5_encoding_len": recorded.text_tokens,
        "encoder.pixel_channels": recorded.pixel_channels,
        "inference.local_batch_size": recorded.batch,
    }
    if recorded.autoencoder is not None:
        keys["encoder.autoencoder_path"] = recorded.autoencoder.path
    options.outranked += [f"--{key} (the picture: {keys[key]})" for key in keys if key in given]
    return rest + [
        word for key, value in keys.items() if key not in given for word in (f"--{key}", str(value))
    ]


def _check_trust(options: argparse.Namespace, rest: list[str]) -> None:
    """Open no file because a picture says so, unless that was asked for.

    Raises:
        ConfigError: naming the files.
    """
    named = {f"--{key}" for key in options.given}
    if options.own_weights:
        named.add("--weights")
        rest = with_parts_of(options.weights, rest)
    foreign = foreign_files(options.recorded, read_config(rest), named)
    if options.trust:
        options.trusted = foreign
    elif foreign:
        raise ConfigError(
            [
                f"--from-png: {options.from_png} wants files that the configuration does not name, "
                f"and a picture can come from anybody: {', '.join(foreign)}. Add --trust to open "
                "them (names on the hub are downloaded), or name them or yours by these options, "
                "or draw with the picture's CONFIG_FILE or --job.dump_folder"
            ]
        )


@dataclass(frozen=True)
class Task:
    """What is to be drawn.

    Attributes:
        requests: each picture.
        settings: of all of them.
        negative: caption to move away from; empty without guidance.
        paths: where each goes.
        batch: pictures that a rank draws at once.
        kept: which of them is kept where a picture is repeated in the batch it was drawn in; None
            keeps all.
        overwrite: whether files may be there already.
    """

    requests: list[Request]
    settings: SampleSettings
    negative: str
    paths: list[Path]
    batch: int
    kept: int | None = None
    overwrite: bool = False


def task_of(options: argparse.Namespace, config: Any, args: FluxModelArgs, ranks: int) -> Task:
    """Everything that the command line asks for.

    Raises:
        FileNotFoundError: naming the file that does not exist.
        ValueError: naming the option that cannot be, and what can.
    """
    recorded: Recorded | None = options.recorded
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
    batch = config.inference.local_batch_size
    if recorded is None:
        requests = [
            Request(prompt, index, again)
            for index, prompt in enumerate(prompts)
            for again in range(options.count)
        ]
        paths = targets(options, config, requests)
        return Task(requests, settings, negative, paths, batch, overwrite=options.overwrite)
    paths = targets(options, config, [Request(prompts[0], recorded.index)])
    row = min(recorded.row, batch - 1)
    # kernels may compute a row of a batch otherwise than the row alone: so the batch is made again
    requests = [Request(prompts[0], recorded.index)] * (batch * ranks)
    return Task(requests, settings, negative, paths, batch, row, options.overwrite)


def read_prompts(options: argparse.Namespace, config: Any) -> list[str]:
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


def settings_of(options: argparse.Namespace, config: Any, args: FluxModelArgs) -> SampleSettings:
    """The run's own settings, or the picture's, changed where the command line says so.

    Published weights have settings of their own, for those of the run are of its training.
    """
    recorded: Recorded | None = options.recorded
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
    options: argparse.Namespace, config: Any, args: FluxModelArgs
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
    recorded: Recorded | None = options.recorded
    if recorded is None:
        return []
    found = list(options.outranked)
    for name in ("size", "steps", "cfg", "guidance", "seed"):
        now, then = getattr(task.settings, name), getattr(recorded.settings, name)
        if now != then:
            found.append(f"--{name} {now} (the picture: {then})")
    if task.requests[0].prompt != recorded.prompt:
        found.append(f"--prompt (the picture: {recorded.prompt!r})")
    if task.negative != recorded.negative_prompt:
        found.append(f"--negative (the picture: {recorded.negative_prompt!r})")
    return found
