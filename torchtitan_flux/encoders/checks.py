"""Whether the frozen parts that a run reads are there, whole, and what they claim to be.

Only names, sizes and headers are looked at, and of a name on the hub its config.json: what takes
longer shows when the parts are loaded.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import ConfigError, Problem, problem_of
from torchtitan_flux.encoders.autoencoder import weights_in
from torchtitan_flux.encoders.pretrained import (
    PUBLISHED,
    TOKENIZER_FILES,
    has_tokenizer,
    read_clip_config,
    read_t5_config,
)
from torchtitan_flux.encoders.text_files import files_in
from torchtitan_flux.encoders.text_weights import TextWeights
from torchtitan_flux.paths import absence, locate, looks_local, resolved_path
from torchtitan_flux.tensor_files.safetensors_file import TensorsFile, UnreadableWeights

TEXT = {key.removeprefix("encoder."): tokenizer for key, (_, tokenizer) in PUBLISHED.items()}
"""Key of [encoder] -> the folder beside the encoder's in FLUX.1's repositories."""

REPOSITORIES = {name: f"black-forest-labs/{name}" for name in ("FLUX.1-dev", "FLUX.1-schnell")}
"""Folder below assets/hf -> the repository on the hub that is downloaded there."""

_DOWNLOADED = re.compile(r"(?:\./)?assets/hf/([^/]+)/(\w+)")


def encoder_problems(config: FluxJobConfig, pixel_space: bool) -> Iterator[Problem]:
    """Files of the encoders and the autoencoder that are missing or violated, each by name.

    Then the command that downloads what a FLUX.1 repository has.

    Args:
        config: the configuration.
        pixel_space: whether the model needs no autoencoder.
    """
    keys = [*TEXT, *([] if pixel_space else ["autoencoder_path"])]
    paths = {key: getattr(config.encoder, key) for key in keys}
    parts: dict[str, list[str]] = {}
    for key, path in paths.items():
        missing = list(_missing(key, path))
        for message, part in missing:
            yield Problem(f"encoder.{key}", message)
            if part and (match := _DOWNLOADED.match(path)) and match[1] in REPOSITORIES:
                parts.setdefault(match[1], []).append(part)
        if key in TEXT and not missing:
            yield from _unreadable(key, path)
    for name, of_repository in parts.items():
        yield Problem(f"assets/hf/{name}", _download(name, of_repository))


def _unreadable(key: str, path: str) -> list[Problem]:
    """Why an encoder cannot be read whose files are there, or whose name may be the hub's."""
    name = f"encoder.{key}"
    try:
        with problem_of(name):
            if locate(path) is not None:
                # what transformers would leave out or make up
                TextWeights(name, resolved_path(path))
            elif key == "t5_encoder":
                read_t5_config(path)
            else:
                read_clip_config(path)
    except ConfigError as error:
        return error.problems
    return []


def _missing(key: str, path: str) -> Iterator[tuple[str, str]]:
    """(what is wrong, the part of the repository that has it: a folder or file, or "")."""
    there = locate(path)
    if key == "autoencoder_path":
        if there is None:
            yield absence(path), Path(path).name
        elif there.is_file():
            yield from ((why, there.name) for why in damaged(there))
        else:
            weights = weights_in(there)
            yield from ((why, there.name) for why in damaged(weights) if weights.is_file())
        return
    part = Path(path).name
    beside = Path(path).parent / TEXT[key]
    if there is None:
        if looks_local(path):
            yield absence(path), part
            if _DOWNLOADED.match(path) and not _has_tokenizer(locate(str(beside))):
                yield f"its tokenizer {str(beside)!r} does not exist", beside.name
        return
    if there.is_file():
        yield "is a file; name the folder with its config.json", ""
        return
    if not (there / "config.json").is_file():
        yield f"{there / 'config.json'} does not exist", part
    try:
        files, _ = files_in(there)
        yield from ((why, part) for file in files for why in damaged(file))
    except (OSError, ValueError) as error:
        yield str(error), part
    if not _has_tokenizer(there) and not _has_tokenizer(locate(str(beside))):
        names = " or ".join(TOKENIZER_FILES)
        yield f"no tokenizer ({names}) is there or in {str(beside)!r}", beside.name


def _has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and has_tokenizer(folder)


def damaged(path: Path) -> Iterator[str]:
    """Why a safetensors file cannot be read, if so, by its header."""
    try:
        TensorsFile.open(path)
    except UnreadableWeights as error:
        yield str(error)


def _download(name: str, parts: list[str]) -> str:
    order = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
    assets = [part for part in order if part in parts]
    files = sorted({part for part in parts if part not in order})
    options = [f"--repo_id {REPOSITORIES[name]}"]
    options += [f"--assets {' '.join(assets)}"] if assets else []
    options += [f"--additional_patterns {' '.join(files)}"] if files else []
    return (
        f"is downloaded by `python scripts/download_hf_assets.py {' '.join(options)} "
        "--hf_token <token>`"
    )
