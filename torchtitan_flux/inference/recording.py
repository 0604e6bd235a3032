"""What is written into a picture, and whether a picture's files are still what they were."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan_flux.inference.command import Task
from torchtitan_flux.inference.draw import Place
from torchtitan_flux.inference.open_run import Beginning
from torchtitan_flux.inference.picture_file import Recorded, Source, digest
from torchtitan_flux.paths import locate, resolved_path


class Recorder:
    """Says of each picture how it was drawn; looks at the files once.

    Args:
        begun: with what.
        task: what is drawn.
    """

    def __init__(self, begun: Beginning, task: Task) -> None:
        config, self._task = begun.config, task
        encoder = config.encoder
        step = re.fullmatch(r"step-(\d+)", begun.checkpoint.name)
        self._common = Recorded(
            prompt="",
            negative_prompt=task.negative,
            settings=task.settings,
            index=0,
            batch=1,
            row=0,
            flavor=config.model.flavor,
            dtype=config.training.mixed_precision_param,
            text_tokens=encoder.max_t5_encoding_len,
            pixel_channels=encoder.pixel_channels,
            step=step[1] if step else "",
            own=begun.weights is None,
            weights=Source.of(begun.checkpoint),
            t5=_source(encoder.t5_encoder),
            clip=_source(encoder.clip_encoder),
            autoencoder=None if begun.args.pixel_space else _source(encoder.autoencoder_path),
        )

    def of(self, number: int, place: Place) -> Recorded:
        """What is to be said of a picture, by its number in the task."""
        request = self._task.requests[number]
        settings = self._task.settings
        return replace(
            self._common,
            prompt=request.prompt,
            settings=replace(settings, seed=settings.seed + request.again),
            index=request.index,
            batch=place.batch,
            row=place.row,
        )


def _source(name: str) -> Source:
    """By the name that the configuration has for it, which other machines have as well."""
    return Source(name, digest(Path(resolved_path(name))))


def check_sources(options: argparse.Namespace, config: Any) -> None:
    """Refuse to repeat a picture with other files than it was drawn with, unless they are named.

    Files that the command line names are taken, and said to be others where they are.

    Raises:
        ValueError: naming what is gone or has changed, and what to do.
    """
    recorded: Recorded | None = options.recorded
    if recorded is None:
        return
    for option, given, now, then in _sources(options, config, recorded):
        found = locate(now)
        if found is None and not then.digest:
            continue  # a name on the hub
        if found is None and not given:
            raise ValueError(
                f"{options.from_png} was drawn with {then.path}, which does not exist (looked up "
                f"from this folder): start where it was drawn, or say where that is now with "
                f"{option} PATH"
            )
        if found is not None and digest(found) != then.digest:
            if not given:
                raise ValueError(
                    f"{options.from_png} was drawn with {then.path}, whose contents have changed: "
                    f"the picture would be another one. To draw it all the same, name them: "
                    f"{option} {now}"
                )
            options.outranked.append(f"{option} {now} (others than the picture was drawn with)")


def _sources(
    options: argparse.Namespace, config: Any, recorded: Recorded
) -> Iterator[tuple[str, bool, str, Source]]:
    """(option, whether the command line gives it, where it is now, what it was)."""
    yield "--weights", options.own_weights, options.weights, recorded.weights
    parts = {
        "t5_encoder": recorded.t5,
        "clip_encoder": recorded.clip,
        "autoencoder_path": recorded.autoencoder,
    }
    for key, then in parts.items():
        if then is not None:
            now = getattr(config.encoder, key)
            yield f"--encoder.{key}", f"encoder.{key}" in options.given, now, then
