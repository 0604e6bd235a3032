"""Weights in any format, read part by part under our names; what they are is found out here.

| format | what is opened |
|---|---|
| diffusers | a pipeline's folder (`model_index.json`), or its `transformer` folder |
| bfl | `flux1-*.safetensors` in Black Forest Labs' names, or the folder that holds the only one |
| comfyui | a single file whose names begin with `model.diffusion_model.` |
| dcp | a checkpoint of ours, verified against its manifest |
| torchtitan | a checkpoint of torchtitan 0.2's own FLUX, read only |
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torchtitan_flux.engine  # noqa: F401  (before torchtitan)

import torch
from torch import Tensor
from torchtitan.tools.logging import logger

from torchtitan_flux.checkpoint import architecture
from torchtitan_flux.checkpoint.folder import verify
from torchtitan_flux.checkpoint.manifest import MANIFEST, Damaged, Manifest
from torchtitan_flux.checkpoint.pieces import joined_dtype, read_joined
from torchtitan_flux.checkpoint.safetensors_file import (
    TensorsFile,
    UnreadableWeights,
    listed,
    read_weight_map,
    refuse_pickle,
)
from torchtitan_flux.checkpoint.scaled import without_scales
from torchtitan_flux.checkpoint.sources import Box, DcpSource, FilesSource, Source
from torchtitan_flux.checkpoint.storage import METADATA
from torchtitan_flux.checkpoint.transformer import (
    Layout,
    foreign_shapes,
    layout_entries,
    our_shapes,
)
from torchtitan_flux.element_types import BeyondRange
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.model.initial_values import initial_rows
from torchtitan_flux.quantized import MARKER, QuantizedWeights, check_integers
from torchtitan_flux.state_dict_keys import check_keys

__all__ = ["FORMATS", "UnreadableWeights", "Weights", "open_weights"]

Guidance = Literal["match", "drop", "initialize"]
Format = Literal["diffusers", "bfl", "comfyui", "dcp", "torchtitan"]
FORMATS: tuple[Format, ...] = ("diffusers", "bfl", "comfyui", "dcp", "torchtitan")

WEIGHTS_NAME = "diffusion_pytorch_model"
INDEX_NAME = f"{WEIGHTS_NAME}.safetensors.index.json"
COMFYUI_PREFIX = "model.diffusion_model."
_OTHER_PARTS = (
    "vae.",
    "first_stage_model.",
    "text_encoders.",
    "cond_stage_model.",
    "conditioner.",
)
"""What single files hold beside the transformer, by the beginning of the names."""

_GUIDANCE = "guidance_in."
_GUIDANCE_DIFFUSERS = "time_text_embed.guidance_embedder."
_TWIN = "time_in.in_layer.weight"
"""Whose element type new guidance weights get."""
_LAYOUTS: dict[Format, Layout] = {
    "diffusers": "diffusers",
    "bfl": "bfl",
    "comfyui": "bfl",
    "dcp": "ours",
    "torchtitan": "torchtitan",
}


class Weights:
    """A FLUX transformer's parameters under our names, wherever and however they are stored.

    Attributes:
        path: what was opened.
        format: what it is.
        args: the architecture that its parameters make up.
        stored: that of the file, before guidance was dropped or initialised.
        shapes, dtypes: of every parameter, by our name; dtypes as they are stored.
    """

    def __init__(
        self,
        path: Path,
        format: Format,
        args: FluxModelArgs,
        source: Source,
        guidance: Guidance = "match",
    ) -> None:
        """Every key of `source` is accounted for here.

        Raises:
            KeyMismatch: names all that is missing, unknown or of another shape.
            UnreadableWeights: guidance weights on one side only, or element types that are not
                floating-point numbers.
        """
        self.path, self.format, self.args = path, format, args
        self._source = source
        self.stored = stored = replace(args, guidance_embed=_has_guidance(source))
        entries = layout_entries(_LAYOUTS[format], stored)
        expected = foreign_shapes(stored, entries)
        found = {name: torch.empty(one, device="meta") for name, one in source.shapes.items()}
        check_keys(found, expected, str(path))
        _check_guidance(path, stored.guidance_embed, args.guidance_embed, guidance)
        try:
            check_integers(source.dtypes)
        except QuantizedWeights as error:
            raise UnreadableWeights(f"{path} {error}") from None
        self._entries = {entry.ours: entry for entry in entries}
        self.shapes = our_shapes(args)
        self.dtypes = {
            name: joined_dtype(self._entries[name if name in self._entries else _TWIN], source)
            for name in self.shapes
        }

    def read(self, name: str, box: Box | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """A part of one of our parameters, in memory of its own.

        Reads the pages that hold the part; from a DCP checkpoint, the stored pieces that it
        touches, one at a time.

        Args:
            name: our name.
            box: a slice (step 1) for each dimension; None for all of it.
            dtype: of the result; None for the stored one.

        Raises:
            KeyError: no such parameter.
            UnreadableWeights: the file could not be read, or a value is beyond what `dtype` holds.
        """
        shape = self.shapes[name]
        dtype = dtype or self.dtypes[name]
        bounds = [
            one.indices(size)[:2]
            for one, size in zip(box or [slice(None)] * len(shape), shape, strict=True)
        ]
        if name not in self._entries:
            return _initialized(name, shape, bounds).to(dtype)
        try:
            return read_joined(self._entries[name], self._source, bounds, dtype)
        except BeyondRange as error:
            raise UnreadableWeights(f"{self.path}: {error}") from None


def open_weights(
    path: str | Path,
    args: FluxModelArgs | None = None,
    guidance: Guidance = "match",
    alone: bool = False,
    alike: FluxModelArgs | None = None,
) -> Weights:
    """Find out what a path holds, and check every key of it.

    Args:
        path: a file or folder in any of the formats above.
        args: the architecture to load into; None takes what the weights say of themselves.
        guidance: what to do where the weights and `args` differ in guidance (FLUX.1-dev has it,
            FLUX.1-schnell not). "match" refuses. "drop" leaves the file's guidance weights out.
            "initialize" makes new ones: the input layer as in a new model (seed 0), the output
            layer zero, so that the model computes what it computed without guidance, whatever
            guidance it is given, until it is trained.
        alone: this process asks no other one. Otherwise, where ranks are joined, all of them have
            to call this: each verifies a share of a checkpoint's files.
        alike: without `args`, a flavor that the weights are of, for what they do not say; widths
            that follow encoders, and guidance, may differ from it.

    Raises:
        UnreadableWeights: the path is none of these formats, or contradicts itself, or its
            architecture cannot be told; the message says what to do.
        KeyMismatch: names every key that is missing, unknown or of another shape.
        FileNotFoundError: there is nothing.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    found = _open_folder(path, alone) if path.is_dir() else _open_file(path)
    found = replace(found, source=without_scales(path, found.source))
    if args is None:
        args = found.declared
        if args is None:
            args = architecture.from_shapes(path, found.source.shapes, alike or found.alike)
        elif alike is not None:
            architecture.check_alike(path, asdict(args), alike)
        wanted = {"match": args.guidance_embed, "drop": False, "initialize": True}[guidance]
        args = replace(args, guidance_embed=wanted)
    elif found.declared is not None:
        _check_declared(path, found.declared, args)
    weights = Weights(path, found.format, args, found.source, guidance)
    if found.format == "torchtitan":
        logger.warning(
            f"{path} was trained by torchtitan 0.2's own FLUX, with causal attention in every "
            "block; here attention is bidirectional, so these weights are a beginning and not a "
            "finished model"
        )
    return weights


@dataclass(frozen=True)
class _Found:
    """What lies at a path.

    Attributes:
        format, source: what it is, and its tensors.
        declared: the architecture that it states.
        alike: a flavor with the same rotary axes and geometry, where only that is known.
    """

    format: Format
    source: Source
    declared: FluxModelArgs | None = None
    alike: FluxModelArgs | None = None


# ---- folders -------------------------------------------------------------------------------


def _open_folder(path: Path, alone: bool) -> _Found:
    if (path / METADATA).is_file() or (path / MANIFEST).is_file():
        return _open_checkpoint(path, alone)
    if (path / "model_index.json").is_file() and (path / "transformer").is_dir():
        return _open_diffusers(path / "transformer")
    if (path / "config.json").is_file() and _has_weights(path):
        return _open_diffusers(path)
    singles = sorted(path.glob("flux1-*.safetensors"))
    if len(singles) == 1:
        return _open_file(singles[0])
    if singles:
        raise UnreadableWeights(
            f"{path} holds several models: {listed(one.name for one in singles)}; give one of the "
            "files"
        )
    for pickle in sorted(path.glob(f"{WEIGHTS_NAME}*.bin")):
        refuse_pickle(pickle)
    steps = sorted(
        (one for one in path.glob("step-*") if re.fullmatch(r"step-\d+", one.name)),
        key=lambda one: int(one.name.removeprefix("step-")),
    )
    if steps:
        raise UnreadableWeights(f"{path} holds checkpoints of a run; give one, as {steps[-1]}")
    raise UnreadableWeights(
        f"{path} holds no FLUX weights: expected is a diffusers folder (model_index.json and "
        f"transformer/, or config.json and {WEIGHTS_NAME}*.safetensors), one flux1-*.safetensors, "
        "or a DCP checkpoint (step-N)"
    )


def _has_weights(folder: Path) -> bool:
    return any(folder.glob(f"{WEIGHTS_NAME}*"))


def _open_diffusers(folder: Path) -> _Found:
    config = folder / "config.json"
    if not config.is_file():
        raise UnreadableWeights(f"{folder} has no config.json; it is no diffusers folder")
    args = architecture.from_diffusers_config(config)
    files = open_shards(folder)
    ours = architecture.from_metadata(files[0].path, files[0].metadata) if files else None
    if ours is not None:  # what config.json has no entry for
        args = replace(args, downscale=ours.downscale, patch_size=ours.patch_size)
    return _Found("diffusers", FilesSource(files), declared=args)


def open_shards(folder: Path) -> list[TensorsFile]:
    """The safetensors files of a diffusers folder, single or by their index.

    Raises:
        UnreadableWeights: names what is missing: weights, a shard, or a tensor in a shard.
    """
    single, index = folder / f"{WEIGHTS_NAME}.safetensors", folder / INDEX_NAME
    if not index.is_file():
        if single.is_file():
            return [TensorsFile.open(single)]
        for pickle in sorted(folder.glob(f"{WEIGHTS_NAME}*.bin")):
            refuse_pickle(pickle)
        shards = sorted(one.name for one in folder.glob(f"{WEIGHTS_NAME}*.safetensors"))
        if shards:
            raise UnreadableWeights(
                f"{folder} has {listed(shards)}, but neither {single.name} nor {index.name}, which "
                "says what is in them; get it again"
            )
        raise UnreadableWeights(f"{folder} has no {single.name}")
    table = read_weight_map(index)
    names = sorted(set(table.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UnreadableWeights(
            f"{index} names {listed(missing)}, which {folder} does not hold; get it again"
        )
    files = [TensorsFile.open(folder / name) for name in names]
    holder = {name: file.path.name for file in files for name in file.shapes}
    lost = [f"{name} (in {file})" for name, file in table.items() if holder.get(name) != file]
    if lost:
        raise UnreadableWeights(f"{index} names tensors that are not there: {listed(lost)}")
    return files


def _open_checkpoint(folder: Path, alone: bool) -> _Found:
    if not (folder / MANIFEST).is_file():
        source = DcpSource(folder)
        if any("_by_head." in name for name in source.shapes):
            raise UnreadableWeights(
                f"{folder} has no {MANIFEST}: it was not saved completely; give another checkpoint"
            )
        return _Found("torchtitan", source)
    problem = _damage(folder) if alone else verify(folder)[1]
    if problem:
        raise UnreadableWeights(f"{folder} is damaged: {problem}; give another checkpoint")
    source, stated = DcpSource(folder), folder / architecture.ARGS_FILE
    if stated.is_file():
        return _Found("dcp", source, declared=architecture.from_args_file(stated))
    return _Found("dcp", source, alike=architecture.flavor_of_run(folder))


def _damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint of ours, found by this process alone; empty when nothing."""
    try:
        manifest = Manifest.read(checkpoint)
        manifest.check_sizes(checkpoint)
        manifest.check_contents(checkpoint, list(manifest.files))
    except Damaged as error:
        return str(error)
    return ""


# ---- single files --------------------------------------------------------------------------


def _open_file(path: Path) -> _Found:
    if path.name == INDEX_NAME:
        return _open_diffusers(path.parent)
    file = TensorsFile.open(path)
    declared = architecture.from_metadata(path, file.metadata)
    if any(name.startswith(COMFYUI_PREFIX) for name in file.shapes):
        return _Found("comfyui", _without_other_parts(file), declared)
    if "x_embedder.weight" in file.shapes:
        raise UnreadableWeights(
            f"{path} holds weights in diffusers' names; give the folder that it lies in, with its "
            "config.json"
        )
    if "encoder.conv_in.weight" in file.shapes:
        raise UnreadableWeights(
            f"{path} is an autoencoder; give the transformer, as flux1-dev.safetensors"
        )
    return _Found("bfl", FilesSource([file]), declared)


def _without_other_parts(file: TensorsFile) -> FilesSource:
    prefixed = (COMFYUI_PREFIX, MARKER)
    others = [name for name in file.shapes if not name.startswith(prefixed)]
    unknown = [name for name in others if not name.startswith(_OTHER_PARTS)]
    if unknown:
        raise UnreadableWeights(
            f"{file.path} holds tensors of no known part: {listed(unknown)}; known are "
            f"{COMFYUI_PREFIX} and {', '.join(_OTHER_PARTS)}"
        )
    if others:
        parts = sorted({next(p for p in _OTHER_PARTS if n.startswith(p)) for n in others})
        logger.info(f"{file.path}: {', '.join(parts)} are not read, only {COMFYUI_PREFIX}")
    return FilesSource([file], COMFYUI_PREFIX)


# ---- checks --------------------------------------------------------------------------------


def _has_guidance(source: Source) -> bool:
    return any(name.startswith((_GUIDANCE, _GUIDANCE_DIFFUSERS)) for name in source.shapes)


def _check_guidance(path: Path, stored: bool, wanted: bool, guidance: Guidance) -> None:
    if stored and not wanted and guidance != "drop":
        raise UnreadableWeights(
            f"{path} has guidance weights (as FLUX.1-dev), the model has no place for them; take a "
            'flavor with guidance, or leave them out with checkpoint.guidance_weights = "drop" '
            "(when converting: --guidance_weights drop)"
        )
    if wanted and not stored and guidance != "initialize":
        raise UnreadableWeights(
            f"{path} has no guidance weights (as FLUX.1-schnell), the model needs them; take a "
            "flavor without guidance, or begin with new ones by checkpoint.guidance_weights = "
            '"initialize" (when converting: --guidance_weights initialize)'
        )


def _check_declared(path: Path, declared: FluxModelArgs, args: FluxModelArgs) -> None:
    """What shapes do not show must agree as well."""
    for name in ("axes_dim", "theta"):
        if getattr(declared, name) != getattr(args, name):
            raise UnreadableWeights(
                f"{path} was made with {name} {getattr(declared, name)}, the model has "
                f"{getattr(args, name)}; take the flavor that it was made with"
            )


def _initialized(name: str, shape: tuple[int, ...], bounds: Iterable[tuple[int, int]]) -> Tensor:
    """New guidance weights, whose contribution is zero until they are trained."""
    if name.startswith(f"{_GUIDANCE}out_layer."):
        whole = torch.zeros(shape)
    else:
        whole = initial_rows(0, name, shape, 0, shape[0])
    return whole[tuple(slice(low, high) for low, high in bounds)].clone()
