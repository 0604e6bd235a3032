"""What is asked for on the command line of run_infer.sh: captions, settings, where pictures go."""

import argparse
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torchtitan_flux.engine  # noqa: F401  (before torchtitan)

from torchtitan.tools.logging import logger

from torchtitan_flux.checkpoint.hub_cache import snapshot_of
from torchtitan_flux.checkpoint.manifest import MANIFEST
from torchtitan_flux.checkpoint.safetensors_file import UnreadableWeights
from torchtitan_flux.checkpoint.scheduler import stated_scheduler
from torchtitan_flux.checkpoint.storage import METADATA
from torchtitan_flux.config.command_line import given_keys
from torchtitan_flux.config.errors import ConfigError
from torchtitan_flux.config.resolve import AUTO, sample_guidance, sample_settings
from torchtitan_flux.generate import SampleSettings
from torchtitan_flux.inference.draw import Request
from torchtitan_flux.inference.picture_file import NoPicture, Recorded
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.paths import locate

EXAMPLES = """examples:
  ./run_infer.sh --prompt "a handwritten seven" --out seven.png
  ./run_infer.sh --prompts prompts.txt --out pictures --steps 28 --cfg 2 --seed 3
  ./run_infer.sh --from-png seven.png --out again.png

Any --section.key value of the configuration may follow; docs/inference.md tells more."""

PUBLISHED_GUIDANCE = 3.5
"""Guidance input that Black Forest Labs draw with."""
OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the rest: `--section.key value` of the configuration.

    A pipeline folder as `--weights` brings its encoders and autoencoder, a picture as `--from-png`
    all that it was drawn with: the rest then names them.

    Raises:
        ConfigError: the picture cannot be repeated.
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
    add("--from-png", metavar="FILE", help="draw a picture of ours again, from what it says")
    add(
        "--weights",
        metavar="PATH",
        help="draw with these instead of the run's checkpoint: a diffusers folder, BFL's or "
        "ComfyUI's safetensors file, or a checkpoint folder",
    )
    add("--out", metavar="PATH", help="PNG file (one picture) or folder")
    add("--size", help="pixels: HEIGHTxWIDTH or one number")
    add("--steps", type=int, help="Euler steps")
    add("--cfg", type=float, help="scale of classifier-free guidance, 1 is off")
    add("--guidance", type=float, help="guidance input of flux-dev")
    add("--negative", metavar="CAPTION", help="caption to move away from, with --cfg")
    add("--seed", type=int, help="of the noise")
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
    if options.memory is not None and not options.estimate:
        raise ConfigError(["--memory is of no use without --estimate"])
    options.recorded, options.outranked = None, []
    options.own_weights = options.weights is not None
    options.given = {key for key, _ in given_keys(rest)}
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
    if wrong:
        raise ConfigError(
            [
                f"{one}: --from-png draws one picture with its own settings; of these --prompt, "
                "--negative, --size, --steps, --cfg, --guidance and --seed can be changed"
                for one in wrong
            ]
        )
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
    """

    requests: list[Request]
    settings: SampleSettings
    negative: str
    paths: list[Path]
    batch: int
    kept: int | None = None


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
    paths = targets(options, config, prompts)
    batch = config.inference.local_batch_size
    if recorded is None:
        requests = [Request(prompt, index) for index, prompt in enumerate(prompts)]
        return Task(requests, settings, negative, paths, batch)
    row = min(recorded.row, batch - 1)
    # kernels may compute a row of a batch otherwise than the row alone: so the batch is made again
    requests = [Request(prompts[0], recorded.index)] * (batch * ranks)
    return Task(requests, settings, negative, paths, batch, kept=row)


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
    if options.size:
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
    if settings.steps < 1:
        raise ValueError(f"--steps {settings.steps}: at least 1")
    args.geometry.check(settings.size)
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


def targets(options: argparse.Namespace, config: Any, prompts: list[str]) -> list[Path]:
    """Where each picture goes.

    Raises:
        ValueError: when one file is to hold several pictures, or a file is no PNG.
    """
    out, folder = options.out, Path(config.job.dump_folder) / config.inference.save_img_folder
    if out is not None:
        folder = Path(out)
        # a dot may be in the name of a folder as well
        suffix = "" if out.endswith("/") or folder.is_dir() else folder.suffix.lower()
        if suffix == ".png":
            if len(prompts) > 1:
                raise ValueError(f"--out {out}: {len(prompts)} pictures need a folder, not a file")
            return [folder]
        if suffix in OTHER_PICTURES:
            raise ValueError(f"--out {out}: pictures are PNG files; name a .png file or a folder")
    if options.recorded is not None:  # never over the picture itself
        return [folder / f"{Path(options.from_png).stem}-again.png"]
    return [folder / f"{i:04d}-{_slug(prompt)}.png" for i, prompt in enumerate(prompts)]


def check_writable(paths: list[Path]) -> None:
    """Refuse what could not be written, before anything is drawn. Leaves nothing behind.

    Raises:
        ValueError: naming the folder and the option.
    """
    for folder in {path.parent for path in paths}:
        try:
            existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise unwritable(folder, error) from None


def unwritable(path: Path, error: OSError) -> ValueError:
    """What to say of a file or folder that cannot be written."""
    return ValueError(
        f"{path} cannot be written ({error.strerror or error}): name another place with --out"
    )


def _slug(prompt: str) -> str:
    """A file name's worth of a caption."""
    return "".join(c if c.isalnum() else "-" for c in prompt.lower())[:60].strip("-") or "empty"


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
