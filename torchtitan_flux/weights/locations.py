"""What lies at a path: which files hold the weights, in which layout, and what they state."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torchtitan_flux.checkpoint.folder import verify
from torchtitan_flux.checkpoint.manifest import MANIFEST, Damaged, Manifest
from torchtitan_flux.checkpoint.storage import METADATA
from torchtitan_flux.formatting import listed
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.tensor_files.file_kinds import PICKLES
from torchtitan_flux.tensor_files.file_sets import all_files, is_index, shard_count, weight_files
from torchtitan_flux.tensor_files.hub_cache import (
    download_command,
    repository_of,
    snapshot_of,
    why_absent,
)
from torchtitan_flux.tensor_files.safetensors_file import TensorsFile, UnreadableWeights
from torchtitan_flux.tensor_files.sources import FilesSource, RenamedSource, Source
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.dcp_source import DcpSource
from torchtitan_flux.weights.names import find_transformer, layout_of

Format = Literal["diffusers", "bfl", "comfyui", "dcp", "torchtitan"]
Trust = Literal["verify", "verify alone", "sizes"]
"""How a checkpoint of ours is checked: every byte, by all ranks together or by this one; or only
that all its files are there in full size."""

WEIGHTS_NAME = "diffusion_pytorch_model"
PIPELINE_INDEX = "model_index.json"
COMFYUI_PREFIX = "model.diffusion_model."

_STEMS = (WEIGHTS_NAME, "flux1", "model", "pytorch_model", "pytorch_lora_weights")
"""Which files of a folder count, where it holds several sets."""
_BELOW = ("transformer", "pytorch_model_fsdp_0", "model", "pytorch_model", "weights")
"""Where the checkpoints of other trainers keep the model."""
_TRAINING_STATE = re.compile(r"(optimizer|scheduler|scaler|random_states|rng_state|training)")
_INSTEAD = {
    "*.distcp": f"has no {METADATA}: a DCP checkpoint that was not saved completely; give another",
    "zero_to_fp32.py": "is a checkpoint of DeepSpeed: run its zero_to_fp32.py with "
    "--safe_serialization, and give what that writes",
    PIPELINE_INDEX: "is a pipeline without its folder transformer; get that as well",
    "*": f"holds no FLUX weights: expected is a diffusers folder ({PIPELINE_INDEX} and "
    f"transformer/, or config.json and {WEIGHTS_NAME}*.safetensors), one flux1-*.safetensors, or a "
    "DCP checkpoint (step-N)",
}
"""Files in a folder without weights -> what it is."""


@dataclass(frozen=True)
class Found:
    """What lies at a path.

    Attributes:
        path: the file or folder that holds it; below the one that was named, where that was a
            cache of the hub or a trainer's folder.
        format: what it is.
        source: its tensors, by the names of their layout.
        declared: the architecture that it states.
        flavor: one with the same rotary axes and geometry, where only that is known.
        left_out: beginnings of the names of other parts beside the transformer.
    """

    path: Path
    format: Format
    source: Source
    declared: FluxModelArgs | None = None
    flavor: FluxModelArgs | None = None
    left_out: tuple[str, ...] = ()


def find(path: Path, trust: Trust = "verify") -> Found:
    """Find out what a path holds; its tensors are looked at by name only.

    Raises:
        UnreadableWeights: it is nothing that can be read; says what it is instead.
        FileNotFoundError: there is nothing.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} {why_absent(path)}")
    return _folder(snapshot_of(path), trust) if path.is_dir() else _file(path)


def _folder(path: Path, trust: Trust) -> Found:
    if (path / MANIFEST).is_file():
        return _checkpoint(path, trust)
    if (path / METADATA).is_file():  # of another program
        return _transformer(path, DcpSource(path), None, path, dcp=True)
    if (path / PIPELINE_INDEX).is_file() and (path / "transformer").is_dir():
        return replace(_folder(path / "transformer", trust), path=path)
    sets = weight_files(path, _STEMS)
    if len(sets) > 1:
        raise UnreadableWeights(
            f"{path} holds several models: {listed(s.shown for s in sets)}; give one of the files"
        )
    if sets:
        return _files(path, sets[0].paths(), sets[0].stem)
    for name in _BELOW:
        if (path / name).is_dir():
            return _folder(path / name, trust)
    raise _no_weights(path)


def _file(path: Path) -> Found:
    if is_index(path):
        files = next(one for one in all_files(path.parent) if one.index == path.name)
        return _files(path.parent, files.paths(), files.stem)
    if path.suffix in (".json", ".distcp") or path.name == METADATA:
        raise UnreadableWeights(f"{path} is no file of weights; give its folder, {path.parent}")
    if (count := shard_count(path)) > 1:
        raise UnreadableWeights(
            f"{path} is one of {count} files of a model; give their folder, {path.parent}"
        )
    return _files(path, [path], path.name.partition(".")[0])


def _files(path: Path, files: list[Path], stem: str) -> Found:
    """A set of files, with what their headers and a `config.json` beside them say."""
    opened = [TensorsFile.open(file) for file in files]
    config, declared = files[0].with_name("config.json"), None
    if config.is_file() and stem == WEIGHTS_NAME:
        declared = architecture.from_diffusers_config(config)
    stated = architecture.from_metadata(files[0], opened[0].metadata)
    if declared is not None and stated is not None:  # what config.json has no entry for
        declared = replace(declared, downscale=stated.downscale, patch_size=stated.patch_size)
    where = files[0] if len(files) == 1 else path
    return _transformer(path, FilesSource(opened), declared or stated, where)


def _transformer(
    path: Path, source: Source, declared: FluxModelArgs | None, where: Path, dcp: bool = False
) -> Found:
    """The transformer among tensors under any names; messages begin with `where`."""
    names = find_transformer(where, source.shapes)
    format: Format
    layout = layout_of(names.names)
    if layout == "ours" and dcp:
        raise UnreadableWeights(
            f"{path} has no {MANIFEST}: it was not saved completely; give another checkpoint"
        )
    if layout == "diffusers" or (layout == "torchtitan" and dcp):
        format = layout
    else:
        format = "comfyui" if names.prefix == COMFYUI_PREFIX and not dcp else "bfl"
    renamed = RenamedSource(source, names.names)
    return Found(path, format, renamed, declared, left_out=names.left_out)


def _checkpoint(folder: Path, trust: Trust) -> Found:
    """A checkpoint of ours."""
    if problem := _damage(folder, trust):
        raise UnreadableWeights(f"{folder} is damaged: {problem}; give another checkpoint")
    source, stated = DcpSource(folder), folder / architecture.ARGS_FILE
    if stated.is_file():
        return Found(folder, "dcp", source, declared=architecture.from_args_file(stated))
    return Found(folder, "dcp", source, flavor=architecture.flavor_of_run(folder))


def _damage(checkpoint: Path, trust: Trust) -> str:
    """What is wrong with a checkpoint of ours; empty when nothing."""
    if trust == "verify":
        return verify(checkpoint)[1]
    try:
        manifest = Manifest.read(checkpoint)
        manifest.check_sizes(checkpoint)
        if trust == "verify alone":
            manifest.check_contents(checkpoint, list(manifest.files))
    except Damaged as error:
        return str(error)
    return ""


def _no_weights(path: Path) -> UnreadableWeights:
    """What to say of a folder without weights: what it holds instead."""
    for one in sorted(path.iterdir()):
        if one.suffix.lower() in (*PICKLES, ".gguf") and not _TRAINING_STATE.match(one.name):
            TensorsFile.open(one)  # which says what that is
        if one.is_dir() and repository_of(one) and not repository_of(path):
            return UnreadableWeights(f"{path} is a cache of the hub; give one folder of it: {one}")
    what = next(
        (what for pattern, what in _INSTEAD.items() if any(path.glob(pattern))), _INSTEAD["*"]
    )
    if last := _last_step(path):
        what = f"holds checkpoints of a run; give one, as {last}"
    if repository := repository_of(path):
        what += f"; {repository} was downloaded without them: {download_command(repository)}"
    return UnreadableWeights(f"{path} {what}")


def _last_step(path: Path) -> Path | None:
    """The newest of a run's checkpoints, by its number."""
    for pattern in ("step-*", "checkpoint/step-*", "checkpoint-*"):
        steps = [one for one in path.glob(pattern) if re.fullmatch(r"\w+-\d+", one.name)]
        if steps:
            return max(steps, key=lambda one: int(one.name.split("-")[1]))
    return None
