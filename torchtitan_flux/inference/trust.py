"""Files that a picture names: a stranger's may name any, so that they are opened when told to."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan_flux.inference.picture_file import Recorded
from torchtitan_flux.paths import locate
from torchtitan_flux.training.resume import checkpoint_folder

KEYS = {"t5": "t5_encoder", "clip": "clip_encoder", "autoencoder": "autoencoder_path"}
"""A picture's sources -> keys of [encoder]."""


def foreign_files(recorded: Recorded, config: Any, named: Collection[str]) -> list[str]:
    """Files and names that a picture brings and the configuration does not have, an entry each.

    The run's own checkpoints and the encoders of the configuration are nobody else's choice.

    Args:
        recorded: what the picture says.
        config: without what the picture says.
        named: options that the command line names, which outrank the picture.
    """
    found = []
    if "--weights" not in named:
        path, own = Path(recorded.weights.path), checkpoint_folder(config)
        step = re.fullmatch(r"step-\d+", path.name)
        if not step or not _same(str(path.parent), str(own)):
            found.append(f"--weights {path}")
    for source, key in KEYS.items():
        then = getattr(recorded, source)
        if then is None or f"--encoder.{key}" in named:
            continue
        if not _same(then.path, getattr(config.encoder, key)):
            found.append(f"--encoder.{key} {then.path}")
    return found


def _same(path: str, other: str) -> bool:
    found, wanted = locate(path), locate(other)
    if found is None or wanted is None:
        return path == other
    return found.resolve() == wanted.resolve()
