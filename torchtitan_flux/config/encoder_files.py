"""Whether the frozen parts that a run reads are there, whole, and what they claim to be.

Only names, sizes and headers are looked at, and of a name on the hub its config.json: what takes
longer shows when the parts are loaded.
"""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torchtitan_flux.encoders.pretrained import (
    PUBLISHED,
    TOKENIZER_FILES,
    has_tokenizer,
    read_clip_config,
    read_t5_config,
)
from torchtitan_flux.paths import locate, looks_local

TEXT = {key.removeprefix("encoder."): tokenizer for key, (_, tokenizer) in PUBLISHED.items()}
"""Key of [encoder] -> the folder beside the encoder's in FLUX.1's repositories."""

REPOSITORIES = {name: f"black-forest-labs/{name}" for name in ("FLUX.1-dev", "FLUX.1-schnell")}
"""Folder below assets/hf -> the repository on the hub that is downloaded there."""

_DOWNLOADED = re.compile(r"(?:\./)?assets/hf/([^/]+)/(\w+)")
_LFS_POINTER = b"version https://git-lfs"


def encoder_problems(config: Any, pixel_space: bool) -> list[str]:
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
    names = {key: path for key, path in paths.items() if key in TEXT and _on_the_hub(path)}
    found += _not_on_the_hub(names)
    return found + [_download(name, parts) for name, parts in wanted.items()]


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
            yield " does not exist", Path(path).name
        elif there.is_file():
            yield from ((why, there.name) for why in broken(there))
        else:
            weights = there / "diffusion_pytorch_model.safetensors"
            yield from ((why, there.name) for why in broken(weights) if weights.is_file())
        return
    part = Path(path).name
    beside = Path(path).parent / TEXT[key]
    if there is None:
        if not _on_the_hub(path):
            yield " does not exist", part
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
    """What is wrong with a text encoder's weights: one file, or an index and its shards."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        yield from broken(single)
    elif index.is_file():
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            yield f": {index} is not an index of weights"
            return
        for name in sorted(names):
            yield from broken(folder / name)
    else:
        others = [path.name for path in folder.glob("pytorch_model*.bin")]
        hint = f"; {others[0]} is not read, for it could run code" if others else ""
        yield f": {single} does not exist{hint}"


def broken(path: Path) -> Iterator[str]:
    """Why a safetensors file cannot be read, if so: its header is compared with its size."""
    if not path.is_file():
        yield f": {path} does not exist"
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            yield f": {path} is a pointer of Git LFS, not the file itself; run `git lfs pull`"
            return
        length = int.from_bytes(start[:8], "little")
        file.seek(8)
        header = file.read(length) if 0 < length <= size - 8 else b""
    try:
        tensors = json.loads(header)
        ends = [tensors[name]["data_offsets"][1] for name in tensors if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError):
        yield f": {path} is not a safetensors file, or is cut short"
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
