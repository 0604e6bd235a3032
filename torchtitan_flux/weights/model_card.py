"""What travels with weights: the licence of what they came from, and a model card."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from torchtitan_flux.checkpoint.manifest import MANIFEST, Manifest
from torchtitan_flux.checkpoint.storage import METADATA
from torchtitan_flux.model import FLAVORS, FluxModelArgs
from torchtitan_flux.paths import locate
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.open import Weights, open_weights

CARD = "README.md"
FOREIGN_CARD = "SOURCE_README.md"
_OURS = "<!-- written by torchtitan-flux -->"
_LICENCE = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)([._-].*)?$", re.IGNORECASE)
_DEV_LICENCE = {
    "license": "other",
    "license_name": "flux-1-dev-non-commercial-license",
    "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
}
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_TOLD = {
    "training": ("dataset", "dataset_path", "img_size", "steps", "local_batch_size", "dtype"),
    "optimizer": ("name", "lr", "weight_decay"),
    "flow": ("time_density", "resolution_shift", "guidance"),
    "sampling": ("schedule",),
    "checkpoint": ("initial_load_path",),
}
"""Entries of a run's configuration that say how a model was trained."""


def travelling_files(
    weights: Weights, format: str, target: Path, dtype: torch.dtype | None
) -> dict[str, bytes]:
    """Licences and the model card of an export, by file name.

    The licence files and the card of the source come along: a card of somebody else's as
    `SOURCE_README.md`, one of ours as the beginning of the new one. A run's weights have the
    licence of what it began with. Derivatives of FLUX.1-dev name its licence.

    Args:
        weights: what is exported.
        format, target, dtype: as what, where to, in which element type (None keeps it).
    """
    origins = _origins(weights)
    found = [_source_files(path) for path in origins]
    files = {
        name: path.read_bytes()
        for of_one in reversed(found)
        for name, path in of_one.items()
        if name != CARD
    }
    cards = [_read(of_one[CARD]) if CARD in of_one else "" for of_one in found]
    if cards[0] and _OURS not in cards[0]:
        files[FOREIGN_CARD] = cards[0].encode()
    licence = next((one for one in map(_stated_licence, cards) if one), {})
    told = any(_OURS in card for card in cards)  # a card of ours without a licence says: none
    if not licence and not told and _derives_from_dev(weights, origins[-1]):
        licence = {**_DEV_LICENCE, "base_model": "black-forest-labs/FLUX.1-dev"}
    files[CARD] = _card(weights, format, target, dtype, cards[0], licence).encode()
    return files


def _origins(weights: Weights) -> list[Path]:
    """The source, what the run that made it began with, what made that, and so on."""
    found = [weights.path]
    while named := (_begun(found[-1]) or {}).get("initial_load_path"):
        path = locate(str(named))
        if path is None or path in found:
            break
        found.append(path)
    return found


def _begun(path: Path) -> Mapping[str, Any] | None:
    """Section `checkpoint` of the run that made a checkpoint; None for anything else."""
    config = architecture.run_config(path) if (path / METADATA).is_file() else None
    return None if config is None else config.get("checkpoint", {})


def _source_files(path: Path) -> dict[str, Path]:
    """Card and licences that lie with weights, by the names they get."""
    if path.is_file():
        begin = f"{path.stem}."
        own = {one.name.removeprefix(begin): one for one in path.parent.glob(f"{begin}*")}
        own = {name: one for name, one in own.items() if name == CARD or _LICENCE.match(name)}
        return own or (_known(path.parent) if _is_model_repository(path.parent) else {})
    files = _known(path)
    if path.name == "transformer" and (path.parent / "model_index.json").is_file():
        files = _known(path.parent) | files
    return files


def _known(folder: Path) -> dict[str, Path]:
    return {
        one.name: one
        for one in sorted(folder.iterdir())
        if one.is_file() and (one.name == CARD or _LICENCE.match(one.name))
    }


def _is_model_repository(folder: Path) -> bool:
    """Whether the card in a folder is about the weights beside it, and not about some project."""
    card = folder / CARD
    return card.is_file() and _FRONT_MATTER.match(_read(card)) is not None


def _read(card: Path) -> str:
    return card.read_text(encoding="utf-8", errors="replace")


def _card(
    weights: Weights,
    format: str,
    target: Path,
    dtype: torch.dtype | None,
    before: str,
    licence: Mapping[str, str],
) -> str:
    library = "diffusers" if format in ("diffusers", "pipeline") else "torchtitan-flux"
    matter = {**licence, "library_name": library, "pipeline_tag": "text-to-image"}
    lines = [f"{name}: {value}" for name, value in matter.items()]
    trained, history = _sections(before) if _OURS in before else ("", "")
    source = "/".join(weights.path.resolve().parts[-2:])
    as_what = "as it was" if dtype is None else f"as {str(dtype).removeprefix('torch.')}"
    history += f"- {source} ({weights.format}) -> {target.name} ({format}), {as_what}\n"
    return "\n".join(
        [
            "---",
            *lines,
            "---",
            _OURS,
            "",
            f"# {target.stem}",
            "",
            _description(weights),
            "",
            "## How it was trained",
            "",
            trained or _training(weights, before),
            "",
            "## Where it comes from",
            "",
            history,
        ]
    )


def _sections(card: str) -> tuple[str, str]:
    """How it was trained, and the lines of where it comes from, of a card of ours."""
    found = re.search(
        r"## How it was trained\n\n(.*?)\n\n## Where it comes from\n\n(.*)\Z", card, re.DOTALL
    )
    return (found[1].strip(), found[2].rstrip("\n") + "\n") if found else ("", "")


def _stated_licence(card: str) -> dict[str, str]:
    """The licence entries in the front matter of a card."""
    found = _FRONT_MATTER.match(card)
    entry = r"^(license|license_name|license_link|base_model): *(\S.*)$"
    return dict(re.findall(entry, found[1] if found else "", re.MULTILINE))


def _derives_from_dev(weights: Weights, origin: Path) -> bool:
    """Whether the first of its origins has FLUX.1-dev's architecture as it is stored.

    Not if the run that made it began with nothing. Of what a run began with, and which is not there
    any more, is known what the run did about guidance.
    """
    begun = _begun(origin)
    if begun is not None and not begun.get("initial_load_path"):
        return False
    stored = weights.stored
    if origin != weights.path:
        with suppress(ValueError, OSError):
            stored = _stored(origin)
    guided = {"drop": True, "initialize": False}.get((begun or {}).get("guidance_weights", ""))
    if guided is not None:
        stored = replace(stored, guidance_embed=guided)
    dev = FLAVORS["flux-dev"]  # of which blocks may have been taken
    return stored == replace(
        dev, depth=stored.depth, depth_single_blocks=stored.depth_single_blocks
    )


def _stored(path: Path) -> FluxModelArgs:
    """Architecture of weights; reads no values, so that it is quick at any size."""
    return open_weights(path, alone=True, contents=False).stored


def _description(weights: Weights) -> str:
    count = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    args = weights.args
    kind = "with" if args.guidance_embed else "without"
    return (
        f"A FLUX transformer of {count:,} parameters, {kind} guidance input: "
        f"{args.depth} double and {args.depth_single_blocks} single blocks of width "
        f"{args.hidden_size}, {args.num_heads} heads."
    )


def _training(weights: Weights, before: str) -> str:
    if weights.format == "torchtitan":
        return (
            "By torchtitan 0.2's own FLUX, with causal attention in every block. Other programs "
            "compute bidirectional attention, as FLUX.1 does: these weights need further training."
        )
    if weights.format == "dcp" and (weights.path / MANIFEST).is_file():
        manifest = Manifest.read(weights.path)
        config = architecture.run_config(weights.path)
        if manifest.step or config:
            return _run_told(manifest, config)
    if before:
        return f"See {FOREIGN_CARD}, which came with {weights.path.name}."
    return f"Not known: it was converted from {weights.path.name}, which says nothing of it."


def _run_told(manifest: Manifest, config: Mapping[str, Any] | None) -> str:
    facts = manifest.facts
    lines = [
        f"With torchtitan-flux: {manifest.step} steps of {facts.global_batch_size} images, "
        f"seed {facts.seed}.",
        "",
    ]
    for section, keys in _TOLD.items():
        values = (config or {}).get(section, {})
        lines += [f"- {section}.{key} = {values[key]!r}" for key in keys if values.get(key)]
    return "\n".join(lines).strip()
