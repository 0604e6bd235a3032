"""What lies at a path: which files hold the weights, in which layout, and what they state."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torchtitan_flux.checkpoint.folder import verify
from torchtitan_flux.checkpoint.manifest import MANIFEST, Damaged, Manifest
from torchtitan_flux.checkpoint.storage import METADATA
from torchtitan_flux.formatting import listed
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.model.initial_values import canonical_name
from torchtitan_flux.paths import why_absent
from torchtitan_flux.tensor_files.file_sets import all_files, shard_count, weight_files
from torchtitan_flux.tensor_files.safetensors_file import TensorsFile, UnreadableWeights
from torchtitan_flux.tensor_files.sources import FilesSource, RenamedSource, Source
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.dcp_source import DcpSource
from torchtitan_flux.weights.key_maps import Layout

Format = Literal["diffusers", "bfl", "comfyui", "dcp", "torchtitan"]
Trust = Literal["verify", "verify alone", "sizes"]
"""How a checkpoint of ours is checked: every byte, by all ranks together or by this one; or only
that all its files are there in full size."""

WEIGHTS_NAME = "diffusion_pytorch_model"
PIPELINE_INDEX = "model_index.json"
COMFYUI_PREFIX = "model.diffusion_model."

_STEMS = (WEIGHTS_NAME, "flux1", "model", "pytorch_model")
"""Which files of a folder count, where it holds several sets."""
_BELOW = ("transformer", "pytorch_model_fsdp_0", "model", "pytorch_model", "weights")
"""Where the checkpoints of other trainers keep the model."""
_OTHER_PARTS = re.compile(
    r"(vae|first_stage_model|autoencoder|text_encoder|text_encoder_2|text_encoders"
    r"|cond_stage_model|conditioner)\."
    # beside the weights, in checkpoints of other trainers
    r"|optim|lr_sched|scheduler\.|scaler|grad_scaler|rng|random|dataloader|train(er|ing)?_state"
    r"|step$|epoch$|global_step"
)
_INPUT = re.compile(r"(?:(.*)\.)?(?:img_in|x_embedder)\.weight")
_TRANSFORMER = "a FLUX transformer"
_KINDS = {
    "a LoRA (adapter)": r"(^|[._])(lora|lokr|hada|oft|boft|ia3|dora|glora|lycoris)(_|\.|\d)"
    r"|\.(diff|diff_b)$",
    _TRANSFORMER: r"(^|\.)((double|single)_blocks|(single_)?transformer_blocks)\.\d+\.",
    "a T5 text encoder": r"layer\.\d+\.SelfAttention\.|(^|\.)enc\.blk\.\d+\.",
    "a CLIP encoder": r"(^|\.)(text_model|vision_model)\.",
    "an autoencoder": r"(^|\.)(en|de)coder\.(conv_in|conv_out|mid|mid_block)\.",
}
"""What weights are -> what the name of one of their tensors holds; the first one counts."""
_DIFFUSERS = re.compile(r"x_embedder\.|(single_)?transformer_blocks\.\d+\.")


@dataclass(frozen=True)
class Found:
    """What lies at a path.

    Attributes:
        path: the file or folder that holds it; below the one that was named, where that was a
            trainer's folder.
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
    return _folder(path, trust) if path.is_dir() else _file(path)


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
    raise UnreadableWeights(
        f"{path} holds no FLUX weights: expected is a diffusers folder ({PIPELINE_INDEX} and "
        f"transformer/, or config.json and {WEIGHTS_NAME}*.safetensors), one flux1-*.safetensors, "
        "or a complete DCP checkpoint (step-N of a run); pickles and GGUF are not read"
    )


def _file(path: Path) -> Found:
    if index := next((one for one in all_files(path.parent) if one.index == path.name), None):
        return _files(path.parent, index.paths(), index.stem)
    if path.suffix in (".json", ".distcp") or path.name == METADATA or shard_count(path) > 1:
        raise UnreadableWeights(f"{path} is only a part of a model; give its folder, {path.parent}")
    return _files(path, [path], path.name.partition(".")[0])


def _files(path: Path, files: list[Path], stem: str) -> Found:
    """A set of files, with what their headers and a `config.json` beside them say."""
    opened = [TensorsFile.open(file) for file in files]
    config, declared = files[0].with_name("config.json"), None
    if config.is_file() and stem == WEIGHTS_NAME:
        declared = architecture.from_diffusers_config(config)
    text = opened[0].metadata.get(architecture.METADATA_KEY)
    stated = architecture.from_json(files[0], text) if text else None
    if declared is not None and stated is not None:  # what config.json has no entry for
        declared = replace(declared, downscale=stated.downscale, patch_size=stated.patch_size)
    where = files[0] if len(files) == 1 else path
    return _transformer(path, FilesSource(opened), declared or stated, where)


def _transformer(
    path: Path, source: Source, declared: FluxModelArgs | None, where: Path, dcp: bool = False
) -> Found:
    """The transformer among tensors under any names; messages begin with `where`."""
    prefix, names, left_out = find_transformer(where, source.shapes)
    layout = layout_of(names)
    if layout == "ours" and dcp:
        raise UnreadableWeights(
            f"{path} has no {MANIFEST}: it was not saved completely; give another checkpoint"
        )
    format: Format = "comfyui" if prefix == COMFYUI_PREFIX and not dcp else "bfl"
    if layout == "diffusers" or (layout == "torchtitan" and dcp):
        format = layout
    return Found(path, format, RenamedSource(source, names), declared, left_out=left_out)


def _checkpoint(folder: Path, trust: Trust) -> Found:
    """A checkpoint of ours."""
    if problem := _damage(folder, trust):
        raise UnreadableWeights(f"{folder} is damaged: {problem}; give another checkpoint")
    source, stated = DcpSource(folder), folder / architecture.ARGS_FILE
    if stated.is_file():
        declared = architecture.from_json(stated, stated.read_text())
        return Found(folder, "dcp", source, declared)
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


def find_transformer(
    path: Path, stored: Collection[str]
) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """Find the transformer among names, behind whatever stands before its input layer.

    Wrappers (`_orig_mod.` of torch.compile, `_fsdp_wrapped_module.`) are taken out of names.

    Returns (prefix, its dot included; name in the transformer's layout -> name as it is stored, a
    name that belongs to no known part standing for itself; beginnings of the names of other parts).
    UnreadableWeights: there is none, and what is there instead; there are several; or two names
    mean one tensor.
    """
    plain = {name: canonical_name(name) for name in stored}
    prefixes = {match[1] or "" for one in plain.values() if (match := _INPUT.fullmatch(one))}
    if len(prefixes) > 1:
        raise UnreadableWeights(
            f"{path} holds several transformers, with names that begin with "
            f"{' and '.join(map(repr, sorted(prefixes)))}; save one of them alone"
        )
    kinds = (kind for kind, one in _KINDS.items() if any(re.search(one, name) for name in stored))
    if not prefixes and (kind := next(kinds, "")) != _TRANSFORMER:
        what = f"{kind} and" if kind else f"{len(stored)} tensors ({listed(stored, 4)}) and"
        raise UnreadableWeights(
            f"{path} holds {what} no FLUX transformer; give a whole one, as flux1-dev.safetensors "
            "or the folder transformer (a LoRA is merged into its model first)"
        )
    prefix = "".join(f"{one}." for one in prefixes if one)
    names: dict[str, str] = {}
    left_out = set()
    for full, one in plain.items():
        inside = one.startswith(prefix)
        if _OTHER_PARTS.match(one) and not (inside and prefix):
            left_out.add(f"{one.split('.')[0]}.")
            continue
        name = one.removeprefix(prefix) if inside else full
        if name in names:
            raise UnreadableWeights(f"{path} holds {name} twice, as {names[name]} and as {full}")
        names[name] = full
    return prefix, names, tuple(sorted(left_out))


def layout_of(names: Iterable[str]) -> Layout:
    """Whose names the tensors of a transformer have; Black Forest Labs' where nothing tells."""
    names = list(names)
    if any("_by_head." in name for name in names):
        return "ours"
    if any(map(_DIFFUSERS.match, names)):
        return "diffusers"
    torchtitan = any(name.endswith("query_norm.weight") for name in names)
    return "torchtitan" if torchtitan else "bfl"
