"""A folder that diffusers' FluxPipeline opens: encoders, autoencoder and scheduler beside it.

Files of the encoders are copied as they are. diffusers' own `save_pretrained` would load them with
whatever it makes up or leaves out, and needs the transformer written twice (docs/log.md).
"""

import filecmp
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from torchtitan_flux.encoders.pretrained import CLIP_KEY, T5_KEY, TOKENIZER_FILES, has_tokenizer
from torchtitan_flux.encoders.text_files import INDEX, SINGLE, files_in
from torchtitan_flux.encoders.text_weights import TextWeights
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.paths import locate
from torchtitan_flux.tensor_files.safetensors_file import TensorsFile, UnreadableWeights, read_json
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.convert_autoencoder import open_autoencoder, verify_vae, write_vae
from torchtitan_flux.weights.open import Weights
from torchtitan_flux.weights.scheduler import (
    PIPELINE_INDEX,
    SCHEDULER_FILE,
    StatedScheduler,
    flavor_scheduler,
    stated_scheduler,
)

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


class _Part(NamedTuple):
    key: str  # of the run's configuration
    folder: str
    tokenizer: str
    tiny: str  # among the package's assets


_PARTS = {
    "t5": _Part(T5_KEY, "text_encoder_2", "tokenizer_2", "t5"),
    "clip": _Part(CLIP_KEY, "text_encoder", "tokenizer", "clip"),
    "autoencoder": _Part("encoder.autoencoder_path", "vae", "", "vae"),
}
"""By the name of the option that gives it."""


class PipelineParts(NamedTuple):
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
    def reads(self) -> list[Path]:
        """All that is copied."""
        return [*self.copies.values(), self.autoencoder]

    @property
    def bytes(self) -> int:
        """How much will be copied."""
        files = (file for one in self.reads for file in (one.glob("*") if one.is_dir() else [one]))
        return sum(file.stat().st_size for file in files)

    def write(self, folder: Path) -> None:
        """Everything but the transformer."""
        for name, path in self.copies.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        write_vae(open_autoencoder(self.autoencoder), folder / "vae")
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / SCHEDULER_FILE).write_bytes(self.scheduler.text.encode())
        index = {**_INDEX, "scheduler": ["diffusers", self.scheduler.name]}
        (folder / PIPELINE_INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def verify(self, folder: Path) -> None:
        """Read back what `write` wrote; UnreadableWeights names what is not as it was."""
        for name, path in self.copies.items():
            if not filecmp.cmp(path, folder / name, shallow=False):
                raise UnreadableWeights(f"the copy {name} differs from {path}; nothing was kept")
        verify_vae(open_autoencoder(self.autoencoder), folder / "vae")


def pipeline_plan(weights: Weights, parts: PipelineParts | None) -> PipelinePlan:
    """Find every part, and check that they fit the transformer; writes nothing.

    Raises:
        UnreadableWeights: a part is not there, is a pickle, or does not fit; names its option.
        ValueError: there can be no pipeline of this model.
    """
    args = weights.args
    if args.pixel_space:
        raise ValueError(
            f"{weights.path} works on pixels, and a FluxPipeline cannot do without an autoencoder; "
            "convert to diffusers, bfl, comfyui or dcp"
        )
    architecture.raise_conditioned(weights.path, args.in_channels, args.out_channels)
    found = _find(weights, parts or PipelineParts())
    copies: dict[str, Path] = {}
    for name in ("t5", "clip"):
        part = _PARTS[name]
        try:
            model, tokenizer = _model_files(found[name], part), _tokenizer_files(found[name], part)
        except (ValueError, OSError) as error:
            raise UnreadableWeights(f"--{name}: {error}") from None
        copies |= {f"{part.folder}/{file}": path for file, path in model.items()}
        copies |= {f"{part.tokenizer}/{path.name}": path for path in tokenizer}
    _check_fit(args, found)
    scheduler = stated_scheduler(weights.path) or flavor_scheduler(args.guidance_embed)
    return PipelinePlan(copies, found["autoencoder"], scheduler)


def _find(weights: Weights, parts: PipelineParts) -> dict[str, Path]:
    """Where each part lies: as given, else beside the source, else as its run names it."""
    root = weights.path if (weights.path / PIPELINE_INDEX).is_file() else weights.path.parent
    config = architecture.run_config(weights.path) if weights.format == "dcp" else None
    encoder = (config or {}).get("encoder", {})
    tiny = Path(str(resources.files("torchtitan_flux"))) / "assets" / "tiny"
    needed = (weights.args.context_in_dim, weights.args.vec_in_dim)
    found = {}
    for name, part in _PARTS.items():
        path, named = getattr(parts, name), encoder.get(part.key.removeprefix("encoder."))
        if path is None and (root / PIPELINE_INDEX).is_file() and (root / part.folder).is_dir():
            path = root / part.folder
        if path is None and named:
            path = locate(named)
        if path is None and _widths(tiny / "t5", tiny / "clip") == needed:
            path = tiny / part.tiny
        if path is None:
            raise UnreadableWeights(
                f"nothing beside {weights.path} says where the pipeline's {part.folder} is; name "
                f"it by --{name}"
            )
        if not path.exists():
            raise UnreadableWeights(f"--{name}: there is no {path}; download it first")
        found[name] = path
    return found


def _model_files(folder: Path, part: _Part) -> dict[str, Path]:
    """config.json and the safetensors of an encoder, by their plain names.

    A pipeline that names no variant looks for those.
    """
    weights, index = files_in(folder)
    if index is None and len(weights) > 1:
        raise ValueError(
            f"{folder} has shards but not their {INDEX}, without which a FluxPipeline does not "
            "find them; get that as well"
        )
    for one in weights:
        TensorsFile.open(one)
    if TextWeights(part.key, folder).scaled:
        raise ValueError(
            f"{folder} holds scaled float8, and a FluxPipeline leaves scales out; give the encoder "
            "that it was made from"
        )
    named = {one.name: one for one in weights} if index else {SINGLE: weights[0]}
    return {"config.json": folder / "config.json", **named, **({INDEX: index} if index else {})}


def _tokenizer_files(folder: Path, part: _Part) -> list[Path]:
    for place in (folder, folder.parent / part.tokenizer):
        if has_tokenizer(place):
            return [place / name for name in _TOKENIZER_FILES if (place / name).is_file()]
    raise ValueError(f"neither {folder} nor {folder.parent / part.tokenizer} holds a tokenizer")


def _check_fit(args: FluxModelArgs, found: Mapping[str, Path]) -> None:
    text, pooled = _widths(found["t5"], found["clip"])
    ae = open_autoencoder(found["autoencoder"]).args
    for name, what, has, needs in (
        ("t5", "features", text, args.context_in_dim),
        ("clip", "features", pooled, args.vec_in_dim),
        ("autoencoder", "latent channels", ae.z_channels, args.geometry.channels),
        ("autoencoder", "pixels per latent cell", ae.downscale, args.downscale),
    ):
        if has != needs:
            raise UnreadableWeights(f"--{name} has {has} {what}, the transformer needs {needs}")


def _widths(t5: Path, clip: Path) -> tuple[int | None, int | None]:
    """Features of the two encoders."""
    pooled = read_json(clip / "config.json")
    pooled = pooled.get("text_config") or pooled
    return read_json(t5 / "config.json").get("d_model"), pooled.get("hidden_size")
