"""Whether the frozen parts that a run reads are there, whole, and what they claim to be.

Only names, sizes and headers are looked at, and of a name on the hub its config.json: what takes
longer shows when the parts are loaded.
"""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torchtitan_flux.config.job_config import FluxJobConfig
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
from torchtitan_flux.tensor_files.file_kinds import other_kind

TEXT = {key.removeprefix("encoder."): tokenizer for key, (_, tokenizer) in PUBLISHED.items()}
"""Key of [encoder] -> the folder beside the encoder's in FLUX.1's repositories."""

REPOSITORIES = {name: f"black-forest-labs/{name}" for name in ("FLUX.1-dev", "FLUX.1-schnell")}
"""Folder below assets/hf -> the repository on the hub that is downloaded there."""

_DOWNLOADED = re.compile(r"(?:\./)?assets/hf/([^/]+)/(\w+)")


def encoder_problems(config: FluxJobConfig, pixel_space: bool) -> list[str]:
    """Files of the encoders and the autoencoder that are missing or broken, each by name.

    Args:
        config: the configuration.
        pixel_space: whether the model needs no autoencoder.

    Returns:
        a line each; then the command that downloads what a FLUX.1 repository has.
    """
    found: list[str] = []
    wanted: dict[str, list[str]] = {}
    paths = {
        key: getattr(config.encoder, key)
        for key in [*TEXT, *([] if pixel_space else ["autoencoder_path"])]
    }
    for key, path in paths.items():
        for line, part in _missing(key, path):
            found.append(f"encoder.{key} = {path!r}{line}")
            if part and (match := _DOWNLOADED.match(path)) and match[1] in REPOSITORIES:
                wanted.setdefault(match[1], []).append(part)
    for key in TEXT:
        if not any(line.startswith(f"encoder.{key} ") for line in found):
            found += _wrong_weights(key, paths[key])
    names = {key: path for key, path in paths.items() if key in TEXT and _on_the_hub(path)}
    found += _not_on_the_hub(names)
    return found + [_download(name, parts) for name, parts in wanted.items()]


def _wrong_weights(key: str, path: str) -> list[str]:
    """What transformers would leave out or make up, of an encoder whose files are there."""
    if locate(path) is None:
        return []
    try:
        TextWeights(f"encoder.{key}", resolved_path(path))
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


def _on_the_hub(path: str) -> bool:
    """What is neither there nor surely a folder may be the name of a repository."""
    return locate(path) is None and not looks_local(path)


def _not_on_the_hub(names: dict[str, str]) -> list[str]:
    """Why names of encoders cannot be read; asked at once: no answer takes half a minute."""

    def reason(key: str) -> list[str]:
        read = {"t5_encoder": read_t5_config, "clip_encoder": read_clip_config}[key]
        try:
            read(names[key])
        except (ValueError, OSError) as error:
            return [str(error)]
        return []

    if not names:
        return []
    with ThreadPoolExecutor() as pool:
        return [line for lines in pool.map(reason, names) for line in lines]


def _missing(key: str, path: str) -> Iterator[tuple[str, str]]:
    """(what is wrong, the part of the repository that has it: a folder or file, or "")."""
    there = locate(path)
    if key == "autoencoder_path":
        if there is None:
            yield f" {absence(path)}", Path(path).name
        elif there.is_file():
            yield from ((why, there.name) for why in broken(there))
        else:
            weights = weights_in(there)
            yield from ((why, there.name) for why in broken(weights) if weights.is_file())
        return
    part = Path(path).name
    beside = Path(path).parent / TEXT[key]
    if there is None:
        if not _on_the_hub(path):
            yield f" {absence(path)}", part
            if _DOWNLOADED.match(path) and not _has_tokenizer(locate(str(beside))):
                yield f": its tokenizer {str(beside)!r} does not exist", beside.name
        return
    if there.is_file():
        yield ": is a file; name the folder with its config.json", ""
        return
    if not (there / "config.json").is_file():
        yield f": {there / 'config.json'} does not exist", part
    yield from ((why, part) for why in _weights(there))
    if not _has_tokenizer(there) and not _has_tokenizer(locate(str(beside))):
        names = " or ".join(TOKENIZER_FILES)
        yield f": no tokenizer ({names}) is there or in {str(beside)!r}", beside.name


def _has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and has_tokenizer(folder)


def _weights(folder: Path) -> Iterator[str]:
    """What is wrong with the files of a text encoder's weights."""
    try:
        files, _ = files_in(folder)
    except (OSError, ValueError) as error:
        yield f": {error}"
        return
    for file in files:
        yield from broken(file)


def broken(path: Path) -> Iterator[str]:
    """Why a safetensors file cannot be read, if so: its header is compared with its size."""
    if not path.is_file():
        yield f": {path} {'is no file' if path.exists() else absence(path)}"
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        header = file.read(length) if 0 < length <= size - 8 else b""
    try:
        tensors = json.loads(header)
        ends = [tensors[name]["data_offsets"][1] for name in tensors if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError):
        yield f": {path} {other_kind(path) or 'is not a safetensors file, or is cut short'}"
        return
    whole = 8 + length + max(ends, default=0)
    if size != whole:
        yield f": {path} is damaged: it has {size:,} bytes, and by its header {whole:,}"


def _download(name: str, parts: list[str]) -> str:
    order = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
    assets = [part for part in order if part in parts]
    files = sorted({part for part in parts if part not in order})
    options = [f"--repo_id {REPOSITORIES[name]}"]
    options += [f"--assets {' '.join(assets)}"] if assets else []
    options += [f"--additional_patterns {' '.join(files)}"] if files else []
    return (
        f"encoder: assets/hf/{name} is downloaded by `python scripts/download_hf_assets.py "
        f"{' '.join(options)} --hf_token <token>`"
    )
