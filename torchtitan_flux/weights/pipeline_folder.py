"""A folder that diffusers' FluxPipeline opens: encoders, autoencoder and scheduler beside it."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from torchtitan_flux.encoders.pretrained import (
    CLIP_KEY,
    T5_KEY,
    TOKENIZER_FILES,
    has_tokenizer,
)
from torchtitan_flux.encoders.text_files import INDEX, SINGLE, files_in
from torchtitan_flux.encoders.text_weights import TextWeights
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.paths import locate
from torchtitan_flux.tensor_files.safetensors_file import (
    TensorsFile,
    UnreadableWeights,
    read_json,
)
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.convert_autoencoder import (
    autoencoder_args,
    open_autoencoder,
    write_vae,
)
from torchtitan_flux.weights.open import Weights
from torchtitan_flux.weights.scheduler import (
    PIPELINE_INDEX,
    SCHEDULER_FILE,
    StatedScheduler,
    flavor_scheduler,
    stated_scheduler,
)

_FLAGS = {"t5": "--t5", "clip": "--clip", "autoencoder": "--autoencoder"}
_SUBFOLDERS = {"t5": "text_encoder_2", "clip": "text_encoder", "autoencoder": "vae"}
_TOKENIZERS = {"t5": "tokenizer_2", "clip": "tokenizer"}
_CONFIG_KEYS = {"t5": "t5_encoder", "clip": "clip_encoder", "autoencoder": "autoencoder_path"}
_KEYS = {"t5": T5_KEY, "clip": CLIP_KEY}
_TINY = {"t5": "t5", "clip": "clip", "autoencoder": "vae"}
_TOKENIZER_FILES = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
)
_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0",
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@dataclass(frozen=True)
class PipelineParts:
    """What stands beside the transformer.

    Attributes:
        t5, clip: folders of the text encoders, with their tokenizers inside or in the folder beside
            them that diffusers gives it (`tokenizer_2`, `tokenizer`).
        autoencoder: a file in BFL's layout or a diffusers `vae` folder.
    """

    t5: Path | None = None
    clip: Path | None = None
    autoencoder: Path | None = None


@dataclass(frozen=True)
class PipelinePlan:
    """A pipeline's folder without its transformer, checked and ready to be written.

    Attributes:
        copies: name in the pipeline -> file.
        autoencoder: see `PipelineParts`.
        scheduler: what the source says of it, or what goes with the model.
    """

    copies: dict[str, Path]
    autoencoder: Path
    scheduler: StatedScheduler

    @property
    def bytes(self) -> int:
        """How much will be copied."""
        vae = [self.autoencoder] if self.autoencoder.is_file() else self.autoencoder.glob("*")
        return sum(one.stat().st_size for one in (*self.copies.values(), *vae))

    @property
    def reads(self) -> list[Path]:
        """All that is copied."""
        return [*self.copies.values(), self.autoencoder]

    def write(self, folder: Path) -> dict[str, str]:
        """Everything but the transformer; returns the checksums of large files by name."""
        sums = {}
        for name, path in self.copies.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            sums[name] = _copy(path, folder / name)
        write_vae(open_autoencoder(self.autoencoder), folder / "vae")
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / SCHEDULER_FILE).write_bytes(self.scheduler.text.encode())
        index = {**_INDEX, "scheduler": ["diffusers", self.scheduler.name]}
        _dump(index, folder / PIPELINE_INDEX)
        return sums


def pipeline_plan(weights: Weights, parts: PipelineParts | None) -> PipelinePlan:
    """Find every part, and check that they fit the transformer; writes nothing.

    Raises:
        UnreadableWeights: a part is not there, is a pickle, or does not fit; names its flag.
        ValueError: there can be no pipeline of this model.
    """
    args = weights.args
    if args.pixel_space:
        raise ValueError(
            f"{weights.path} works on pixels: a FluxPipeline cannot do without an autoencoder; "
            "convert to diffusers, bfl, comfyui or dcp"
        )
    architecture.raise_conditioned(weights.path, args.in_channels, args.out_channels)
    architecture.to_diffusers_config(args)  # raises where there is no such transformer
    found = _find(weights, parts or PipelineParts())
    copies: dict[str, Path] = {}
    for part in ("t5", "clip"):
        folder = found[part]
        copies |= {f"{_SUBFOLDERS[part]}/{n}": one for n, one in _model_files(folder, part).items()}
        tokenizer = _tokenizer_files(folder, part)
        copies |= {f"{_TOKENIZERS[part]}/{name}": one for name, one in tokenizer.items()}
    _check_fit(args, found)
    scheduler = stated_scheduler(weights.path) or flavor_scheduler(args.guidance_embed)
    return PipelinePlan(copies, found["autoencoder"], scheduler)


def _find(weights: Weights, parts: PipelineParts) -> dict[str, Path]:
    """Where each part lies: as told, else beside the source, else as its run names it."""
    given = {one.name: getattr(parts, one.name) for one in fields(parts)}
    root = weights.path if (weights.path / PIPELINE_INDEX).is_file() else weights.path.parent
    config = architecture.run_config(weights.path) if weights.format == "dcp" else None
    encoder: Mapping[str, Any] = (config or {}).get("encoder", {})
    tiny = Path(str(resources.files("torchtitan_flux"))) / "assets" / "tiny"
    fits_tiny = _widths(tiny / "t5", tiny / "clip") == (
        weights.args.context_in_dim,
        weights.args.vec_in_dim,
    )
    found = {}
    for part, path in given.items():
        beside = root / _SUBFOLDERS[part]
        named = encoder.get(_CONFIG_KEYS[part])
        if path is None and (root / PIPELINE_INDEX).is_file() and beside.is_dir():
            path = beside
        if path is None and named:
            path = locate(named)
        if path is None and fits_tiny:
            path = tiny / _TINY[part]
        if path is None:
            raise UnreadableWeights(
                f"a pipeline needs {' and '.join(_FLAGS.values())}: nothing beside {weights.path} "
                f"says where {_SUBFOLDERS[part]} is; name it by {_FLAGS[part]}"
            )
        path = Path(path)
        if not path.exists():
            raise UnreadableWeights(f"{_FLAGS[part]}: there is no {path}; download it first")
        found[part] = path
    return found


def _model_files(folder: Path, part: str) -> dict[str, Path]:
    """config.json and the safetensors of an encoder."""
    config = folder / "config.json"
    if not config.is_file():
        raise UnreadableWeights(f"{_FLAGS[part]}: {folder} is no encoder, it has no config.json")
    try:
        weights, index = files_in(folder)
    except (OSError, ValueError) as error:
        raise UnreadableWeights(f"{_FLAGS[part]}: {error}") from None
    if index is None and len(weights) > 1:
        raise UnreadableWeights(
            f"{_FLAGS[part]}: {folder} has shards but not their {INDEX}, without which a "
            "FluxPipeline does not find them; get that as well"
        )
    for one in weights:
        TensorsFile.open(one)
    try:
        scaled = TextWeights(_KEYS[part], folder, flag=_FLAGS[part]).scaled
    except (ValueError, OSError) as error:
        raise UnreadableWeights(str(error)) from None
    if scaled:
        raise UnreadableWeights(
            f"{_FLAGS[part]}: {folder} holds scaled float8, and a FluxPipeline leaves scales out; "
            "give the encoder that it was made from"
        )
    # under plain names, where a pipeline that names no variant looks for them
    named = {SINGLE: weights[0]} if index is None else {one.name: one for one in weights}
    return {config.name: config, **named, **({INDEX: index} if index else {})}


def _tokenizer_files(folder: Path, part: str) -> dict[str, Path]:
    for place in (folder, folder.parent / _TOKENIZERS[part]):
        if has_tokenizer(place):
            return {n: place / n for n in _TOKENIZER_FILES if (place / n).is_file()}
    raise UnreadableWeights(
        f"{_FLAGS[part]}: neither {folder} nor {folder.parent / _TOKENIZERS[part]} holds a "
        "tokenizer"
    )


def _check_fit(args: FluxModelArgs, found: Mapping[str, Path]) -> None:
    text, vector = _widths(found["t5"], found["clip"])
    ae = autoencoder_args(found["autoencoder"])
    for flag, what, has, needs in (
        ("--t5", "features", text, args.context_in_dim),
        ("--clip", "features", vector, args.vec_in_dim),
        ("--autoencoder", "latent channels", ae.z_channels, args.geometry.channels),
        ("--autoencoder", "pixels per latent cell", ae.downscale, args.downscale),
    ):
        if has != needs:
            raise UnreadableWeights(f"{flag} has {has} {what}, the transformer needs {needs}")


def _widths(t5: Path, clip: Path) -> tuple[int | None, int | None]:
    """Features of the two encoders."""
    vector = read_json(clip / "config.json")
    vector = vector.get("text_config") or vector
    return read_json(t5 / "config.json").get("d_model"), vector.get("hidden_size")


def _copy(path: Path, target: Path) -> str:
    """Copy a file; returns its SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as source, target.open("wb") as out:
        while block := source.read(8 * 2**20):
            digest.update(block)
            out.write(block)
    shutil.copymode(path, target)
    return digest.hexdigest()


def _dump(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
