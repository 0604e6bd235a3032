"""A folder that diffusers' FluxPipeline opens: encoders, autoencoder and scheduler beside it.

Encoders are copied as they are: `save_pretrained` would write what it made of them (docs/log.md).
"""

import filecmp
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from torchtitan_flux.encoders.pretrained import (
    CLIP_KEY,
    PUBLISHED,
    T5_KEY,
    TOKENIZER_FILES,
    tokenizer_folder,
)
from torchtitan_flux.encoders.text import INDEX, SINGLE, TextWeights, files_in
from torchtitan_flux.paths import locate
from torchtitan_flux.tensor_files.safetensors_file import (
    TensorsFile,
    UnreadableWeights,
    read_json,
    write_json,
)
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.convert_autoencoder import open_autoencoder, verify_vae, write_vae
from torchtitan_flux.weights.locations import PIPELINE_INDEX
from torchtitan_flux.weights.open import Weights
from torchtitan_flux.weights.scheduler import (
    SCHEDULER_FILE,
    StatedScheduler,
    flavor_scheduler,
    stated_scheduler,
)


class _Part(NamedTuple):
    """How a part is called: the key of a run's configuration that names it, its folder in a
    pipeline, and that of its tokenizer."""

    key: str
    folder: str
    tokenizer: str = ""


_PARTS = {
    "t5": _Part(T5_KEY, *PUBLISHED[T5_KEY]),
    "clip": _Part(CLIP_KEY, *PUBLISHED[CLIP_KEY]),
    "autoencoder": _Part("encoder.autoencoder_path", "vae"),
}
_MORE_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER_FILES = (*TOKENIZER_FILES, *_MORE_TOKENIZER_FILES, "merges.txt")
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


class PipelineParts(NamedTuple):
    """What stands beside the transformer: folders of the text encoders, with their tokenizers
    inside or beside them (`tokenizer_2`, `tokenizer`); BFL's autoencoder or a `vae` folder."""

    t5: Path | None = None
    clip: Path | None = None
    autoencoder: Path | None = None


@dataclass(frozen=True)
class PipelinePlan:
    """A pipeline's folder without its transformer, checked and ready to be written.

    Attributes:
        copies: name in the folder -> file.
    """

    copies: dict[str, Path]
    autoencoder: Path
    scheduler: StatedScheduler

    @property
    def bytes(self) -> int:
        """How much will be written."""
        vae = self.autoencoder
        files = [*self.copies.values(), *(vae.glob("*") if vae.is_dir() else [vae])]
        return sum(file.stat().st_size for file in files)

    def write(self, folder: Path) -> None:
        """Everything but the transformer."""
        for name, path in self.copies.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        write_vae(*open_autoencoder(self.autoencoder), folder / "vae")
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / SCHEDULER_FILE).write_bytes(self.scheduler.text.encode())
        index = {**_INDEX, "scheduler": ["diffusers", self.scheduler.name]}
        write_json(folder / PIPELINE_INDEX, index)

    def verify(self, folder: Path) -> None:
        """Read back what `write` wrote; UnreadableWeights names what is not as it was."""
        for name, path in self.copies.items():
            if not filecmp.cmp(path, folder / name, shallow=False):
                raise UnreadableWeights(f"the copy {name} differs from {path}; nothing was kept")
        verify_vae(open_autoencoder(self.autoencoder)[1], folder / "vae")


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
    given = (parts or PipelineParts())._asdict()
    t5, clip, vae = (_find(name, path, weights) for name, path in given.items())
    copies: dict[str, Path] = {}
    for name, folder in (("t5", t5), ("clip", clip)):
        try:
            copies |= _encoder_files(_PARTS[name], folder)
        except (ValueError, OSError) as error:
            raise UnreadableWeights(f"--{name}: {error}") from None
    autoencoder, _ = open_autoencoder(vae)
    for name, what, has, needs in (
        ("t5", "features", _width(t5), args.context_in_dim),
        ("clip", "features", _width(clip), args.vec_in_dim),
        ("autoencoder", "latent channels", autoencoder.z_channels, args.geometry.channels),
        ("autoencoder", "pixels per latent cell", autoencoder.downscale, args.downscale),
    ):
        if has != needs:
            raise UnreadableWeights(f"--{name} has {has} {what}, the transformer needs {needs}")
    scheduler = stated_scheduler(weights.path) or flavor_scheduler(args.guidance_embed)
    return PipelinePlan(copies, vae, scheduler)


def _find(name: str, given: Path | None, weights: Weights) -> Path:
    """Where a part lies: as given, else beside the source, else as its run names it."""
    part, found, source = _PARTS[name], given, weights.path
    root = next((one for one in (source, source.parent) if (one / PIPELINE_INDEX).is_file()), None)
    if found is None and root and (root / part.folder).is_dir():
        found = root / part.folder
    if found is None and weights.format == "dcp":
        section, key = part.key.split(".")
        named = (architecture.run_config(source) or {}).get(section, {}).get(key)
        found = locate(named) if named else None
    tiny = Path(str(resources.files("torchtitan_flux"))) / "assets" / "tiny"
    widths = (weights.args.context_in_dim, weights.args.vec_in_dim)
    if found is None and widths == (_width(tiny / "t5"), _width(tiny / "clip")):
        found = tiny / ("vae" if name == "autoencoder" else name)
    if found is None:
        raise UnreadableWeights(
            f"nothing beside {source} says where the {part.folder} is; name it by --{name}"
        )
    if not found.exists():
        raise UnreadableWeights(f"--{name}: there is no {found}; download it first")
    return found


def _encoder_files(part: _Part, folder: Path) -> dict[str, Path]:
    """A text encoder and its tokenizer: name in the pipeline -> file.

    A variant of the weights gets its plain name, which is what a pipeline looks for.
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
    files = {one.name: one for one in weights} if index else {SINGLE: weights[0]}
    files |= {"config.json": folder / "config.json"} | ({INDEX: index} if index else {})
    place = tokenizer_folder(folder, part.key)
    tokenizer = [place / name for name in _TOKENIZER_FILES if (place / name).is_file()]
    return {f"{part.folder}/{name}": path for name, path in files.items()} | {
        f"{part.tokenizer}/{path.name}": path for path in tokenizer
    }


def _width(encoder: Path) -> int | None:
    """Features of a text encoder."""
    config = read_json(encoder / "config.json")
    return config.get("d_model") or (config.get("text_config") or config).get("hidden_size")
