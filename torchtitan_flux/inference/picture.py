"""Pictures to draw: captions and settings that are asked for, where they go, and repeating one."""

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim

from torchtitan.tools.logging import logger

import torchtitan_flux
from torchtitan_flux.checkpoint.manifest import MANIFEST
from torchtitan_flux.checkpoint.storage import METADATA
from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.image_file import FORMATS, read_facts
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.paths import locate
from torchtitan_flux.sampling.generate import SampleSettings
from torchtitan_flux.sampling.schedules import Schedule
from torchtitan_flux.startup.model_args import AUTO, sample_guidance, sample_settings
from torchtitan_flux.weights.scheduler import stated_scheduler

PUBLISHED_GUIDANCE = 3.5
"""Guidance input that Black Forest Labs draw with."""


@dataclass(frozen=True)
class Picture:
    """A picture to draw, or as it was drawn.

    Attributes:
        settings: size, steps, guidance, schedule, seed.
        index: of the caption; the noise is a function of (settings.seed, index).
        names: flavor, weights, encoders. They are text: nothing that a picture names is opened.
    """

    prompt: str
    negative_prompt: str
    settings: SampleSettings
    index: int
    names: Mapping[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, str | int]:
        """For `save_picture`."""
        return {
            **self.names,
            **self.settings.facts(),
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "index": self.index,
            "software": "torchtitan-flux",
            "version": torchtitan_flux.__version__,
        }

    @classmethod
    def read(cls, path: Path) -> "Picture":
        """From a PNG, JPEG or WebP; ValueError where run_infer.sh did not write it."""
        try:
            text = read_facts(path)
            settings = SampleSettings(
                size=_size(text["size"]),
                steps=int(text["steps"]),
                cfg=float(text["cfg"]),
                guidance=None if text["guidance"] == "None" else float(text["guidance"]),
                schedule=Schedule.parse(text["schedule"]),
                seed=int(text["seed"]),
            )
            found = cls(text["prompt"], text["negative_prompt"], settings, int(text["index"]))
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} does not say how it was drawn ({type(error).__name__}: {error}); pictures "
                "of run_infer.sh do, unless another program has saved them again"
            ) from None
        names = {name: value for name, value in text.items() if name not in found.facts()}
        return replace(found, names=names)

    def differences(self, other: "Picture") -> Iterator[str]:
        """What another picture has otherwise than this one, an entry each."""
        known = self.facts()
        for name, now in other.facts().items():
            then = known.get(name, now)
            if str(then) != str(now) and name != "version":
                yield f"{name} {now} (the picture: {then})"


def requested(
    options: argparse.Namespace, config: FluxJobConfig, args: FluxModelArgs
) -> list[Picture]:
    """All pictures that are asked for; ValueError, FileNotFoundError name the option.

    Their size, steps, scales and negative prompt are the same.
    """
    recorded: Picture | None = options.recorded
    prompts = _prompts(options, config.inference.prompts_path)
    settings = _settings(options, config, args)
    if settings.cfg == 1.0 and options.negative:
        raise ValueError("--negative needs classifier-free guidance: give --cfg a scale above 1")
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


def _prompts(options: argparse.Namespace, default: str) -> list[str]:
    """Captions from the command line, the picture to repeat, or the file that is named."""
    if options.prompt:
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


def _settings(
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
        given["size"] = _size(options.size)
    if options.recorded is not None:
        base = options.recorded.settings
    else:
        weights = options.weights and (locate(options.weights) or Path(options.weights))
        base = sample_settings(config, args, weights)
        if config.inference.img_size:
            base = replace(base, size=ImageSize.of(config.inference.img_size))
        if weights and not any((weights / name).is_file() for name in (METADATA, MANIFEST)):
            given = _of_published(options, config, args) | given
        if weights and config.sampling.schedule == AUTO and (stated := stated_scheduler(weights)):
            logger.info(f"Drawn with the schedule {base.schedule}, as {stated.where} says")
    if args.guidance_embed != (base.guidance is not None):  # another flavor than the picture's
        given.setdefault("guidance", sample_guidance(config, args))
    settings = replace(base, **given)
    try:
        settings.times(args.geometry)
    except ValueError as error:
        raise ValueError(f"--size {settings.size}, --steps {settings.steps}: {error}") from None
    return settings


def _size(text: str) -> ImageSize:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(f"--size {text}: give HEIGHTxWIDTH or one number of pixels")
    return ImageSize(int(sides[0]), int(sides[-1]))


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


def targets(options: argparse.Namespace, folder: Path, pictures: Sequence[Picture]) -> list[Path]:
    """Where each picture goes; in `folder` unless --out names another place.

    A file holds one picture; of several, `x.png` becomes `x-1.png`, `x-2.png`, … Raises ValueError
    for a format that is not written.
    """
    out = options.out
    if out is not None:
        folder = Path(out)
        # a dot may be in the name of a folder as well
        named = "" if out.endswith(os.sep) or os.path.isdir(out) else folder.suffix.lower()
        if named in FORMATS:
            names = [f"-{i}" for i in range(1, 1 + len(pictures))] if len(pictures) > 1 else [""]
            return [folder.with_name(f"{folder.stem}{one}{folder.suffix}") for one in names]
        if named[1:2].isalpha():  # .gif, or a slip; v1.5 is no suffix
            raise ValueError(
                f"--out {out}: {named} is none of {', '.join(FORMATS)}; the name of a new folder "
                f"ends with a slash: {out}{os.sep}"
            )
    if options.recorded is not None:
        return [folder / f"{Path(options.from_png).stem}-again.png"]
    names = [f"{one.index:04d}-{_slug(one.prompt)}" for one in pictures]
    if options.count > 1:
        names = [f"{name}-{i % options.count + 1}" for i, name in enumerate(names)]
    return [folder / f"{name}.png" for name in names]


def check_paths(paths: Sequence[Path], overwrite: bool) -> None:
    """Raise ValueError where something is in the way, or cannot be written. Leaves nothing."""
    taken = [path for path in paths if os.path.lexists(path)]
    if folders := [path for path in taken if path.is_dir()]:
        raise ValueError(f"{folders[0]} is a folder: name another place with --out")
    if taken and not overwrite:
        raise ValueError(f"{taken[0]} exists: --overwrite replaces it, --out names another place")
    for folder in {path.parent for path in paths}:
        try:
            existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
            tempfile.TemporaryFile(dir=existing).close()
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
