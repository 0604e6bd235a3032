"""Whether the frozen parts that a run reads are there, whole, and what they claim to be.

Only names, sizes and headers are looked at, and of a name on the hub its config.json: what takes
longer shows when the parts are loaded.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import ConfigError, Problem, problem_of
from torchtitan_flux.encoders.autoencoder import autoencoder_geometry
from torchtitan_flux.encoders.pretrained import (
    CLIP_KEY,
    T5_KEY,
    read_clip_config,
    read_t5_config,
    tokenizer_folder,
)
from torchtitan_flux.encoders.text import TextWeights
from torchtitan_flux.paths import resolved_path

_ASSETS = {CLIP_KEY: "text_encoder tokenizer", T5_KEY: "text_encoder_2 tokenizer_2"}
_DOWNLOADED = re.compile(r"(?:\./)?(assets/hf/(FLUX\.1-(?:dev|schnell)))/")


def encoder_problems(config: FluxJobConfig, pixel_space: bool) -> Iterator[Problem]:
    """Files of the encoders and the autoencoder that are missing or violated, each by name.

    Then the command that downloads what a FLUX.1 repository has.

    Args:
        config: the configuration.
        pixel_space: whether the model needs no autoencoder.
    """
    keys = [T5_KEY, CLIP_KEY, *([] if pixel_space else ["encoder.autoencoder_path"])]
    missing: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        given = getattr(config.encoder, key.removeprefix("encoder."))
        try:
            with problem_of(key):
                _check(key, resolved_path(given))
        except ConfigError as error:
            yield from error.problems
            if found := _DOWNLOADED.match(given):
                missing.setdefault((found[1], found[2]), []).append(key)
    for (folder, name), of in missing.items():
        options = f"--repo_id black-forest-labs/{name}"
        if assets := [_ASSETS[key] for key in (CLIP_KEY, T5_KEY) if key in of]:
            options += f" --assets {' '.join(assets)}"
        if not {*of} <= {*_ASSETS}:
            options += " --additional_patterns ae.safetensors"
        command = f"`python scripts/download_hf_assets.py {options} --hf_token <token>`"
        yield Problem(folder, f"is downloaded by {command}")


def _check(key: str, path: str) -> None:
    if key not in (T5_KEY, CLIP_KEY):
        autoencoder_geometry(path)
    elif Path(path).is_dir():
        TextWeights(key, path)  # what transformers would leave out or make up
        tokenizer_folder(Path(path), key)
    elif key == T5_KEY:
        read_t5_config(path)
    else:
        read_clip_config(path)
