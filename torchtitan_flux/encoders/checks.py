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

_DOWNLOADED = re.compile(r"(?:\./)?(assets/hf/(FLUX\.1-(?:dev|schnell)))/")


def encoder_problems(config: FluxJobConfig, pixel_space: bool) -> Iterator[Problem]:
    """Files of the encoders and the autoencoder that are missing or violated, each by name.

    Then the command that downloads what a FLUX.1 repository has.

    Args:
        config: the configuration.
        pixel_space: whether the model needs no autoencoder.
    """
    keys = [T5_KEY, CLIP_KEY, *([] if pixel_space else ["encoder.autoencoder_path"])]
    downloads: dict[str, str] = {}
    for key in keys:
        given = getattr(config.encoder, key.removeprefix("encoder."))
        try:
            with problem_of(key):
                _check(key, resolved_path(given))
        except ConfigError as error:
            yield from error.problems
            if found := _DOWNLOADED.match(given):
                downloads[found[1]] = found[2]
    for folder, name in downloads.items():
        yield Problem(
            folder,
            "is downloaded by `python scripts/download_hf_assets.py --repo_id "
            f"black-forest-labs/{name} --assets text_encoder text_encoder_2 tokenizer tokenizer_2 "
            "--additional_patterns ae.safetensors --hf_token <token>`",
        )


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
