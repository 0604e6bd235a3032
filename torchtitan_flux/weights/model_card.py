"""What travels with weights: the licence of what they came from, and a model card."""

import glob
import re
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from torchtitan_flux.checkpoint.manifest import MANIFEST, Manifest
from torchtitan_flux.checkpoint.storage import METADATA
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.paths import locate
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.open import Weights

CARD = "README.md"
FOREIGN_CARD = "SOURCE_README.md"
PROVENANCE = "torchtitan_flux"
"""Where the front matter of our cards says what weights come from; foreign cards have none."""
_LICENSE_FILE = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)([._-].*)?$", re.IGNORECASE)
_LICENSE_KEYS = ("license", "license_name", "license_link", "base_model")
_DEV_LICENSE = {
    "license": "other",
    "license_name": "flux-1-dev-non-commercial-license",
    "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    "base_model": "black-forest-labs/FLUX.1-dev",
}
_RUN_KEYS = {
    "training": ("dataset", "dataset_path", "img_size"),
    "optimizer": ("name", "lr"),
    "checkpoint": ("initial_load_path",),
}
"""What a card repeats of a run's configuration."""


def companion_files(weights: Weights, name: str, diffusers: bool) -> dict[str, bytes]:
    """Licences and the model card of an export called `name`, by file name.

    The licence files and the card of the source come along, a card of somebody else's as
    `SOURCE_README.md`. A run's weights have the licence of what it began with. Derivatives of
    FLUX.1-dev name its licence.
    """
    origins, runs = _origins(weights.path)
    found = [license_and_card(path) for path in origins]
    files = {name: path.read_bytes() for one in reversed(found) for name, path in one.items()}
    files.pop(CARD, None)
    cards = [_metadata(one[CARD]) if CARD in one else {} for one in found]
    if CARD in found[0] and PROVENANCE not in cards[0]:
        files[FOREIGN_CARD] = found[0][CARD].read_bytes()
    licenses = [{key: card[key] for key in _LICENSE_KEYS if key in card} for card in cards]
    license = next(filter(None, licenses), {})
    known = any(PROVENANCE in card for card in cards)  # a card of ours without a licence says: none
    if not license and not known and _derives_from_dev(weights, runs):
        license = _DEV_LICENSE
    data: dict[str, Any] = {
        **license,
        "library_name": "diffusers" if diffusers else "torchtitan-flux",
        "pipeline_tag": "text-to-image",
        PROVENANCE: cards[0].get(PROVENANCE) or _provenance(weights),
    }
    about = f"`{PROVENANCE}` above" + f", and {FOREIGN_CARD}" * (FOREIGN_CARD in files)
    files[CARD] = (
        f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n# {name}\n\n"
        f"A FLUX transformer of {sum(map(prod, weights.shapes.values())):,} parameters. "
        f"What it comes from: {about}.\n"
    ).encode()
    return files


def license_and_card(path: Path) -> dict[str, Path]:
    """Card and licences that lie with weights, by the names that they have in a folder."""
    if path.is_dir():
        in_pipeline = path.name == "transformer" and (path.parent / "model_index.json").is_file()
        return (_known(path.parent) if in_pipeline else {}) | _known(path)
    if own := _known(path.parent, f"{path.stem}."):
        return own
    files = _known(path.parent)  # of the weights, or of some project that they lie in
    return files if CARD in files and _metadata(files[CARD]) else {}


def _known(folder: Path, prefix: str = "") -> dict[str, Path]:
    found = sorted(one for one in folder.glob(f"{glob.escape(prefix)}*") if one.is_file())
    names = {one.name.removeprefix(prefix): one for one in found}
    return {name: one for name, one in names.items() if name == CARD or _LICENSE_FILE.match(name)}


def _metadata(card: Path) -> dict[str, Any]:
    """The front matter of a card; empty where it is none."""
    with suppress(ValueError, yaml.YAMLError):
        return metadata_load(card) or {}
    return {}


def _origins(path: Path) -> tuple[list[Path], list[dict[str, Any]]]:
    """The source, what the run that made it began with, what made that, and so on; and [checkpoint]
    of those runs."""
    origins, runs = [path], []
    while (origins[-1] / METADATA).is_file() and (config := architecture.run_config(origins[-1])):
        runs.append(config.get("checkpoint", {}))
        named = runs[-1].get("initial_load_path")
        origin = locate(str(named)) if named else None
        if origin is None or origin in origins:
            break
        origins.append(origin)
    return origins, runs


def _derives_from_dev(weights: Weights, runs: list[dict[str, Any]]) -> bool:
    """Whether the first of its origins was stored in FLUX.1-dev's architecture, of any depth.

    Not if its run began with nothing. What runs did about guidance tells what they began with.
    """
    if runs and not runs[-1].get("initial_load_path"):
        return False
    guided = weights.stored.guidance_embed
    for run in runs:
        guided = {"drop": True, "initialize": False}.get(run.get("guidance_weights", ""), guided)
    dev, stored = FLAVORS["flux-dev"], weights.stored
    depths = {"depth": dev.depth, "depth_single_blocks": dev.depth_single_blocks}
    return replace(stored, guidance_embed=guided, **depths) == dev


def _provenance(weights: Weights) -> dict[str, Any]:
    about: dict[str, Any] = {"source": f"{weights.path.name} ({weights.format})"}
    if weights.format == "torchtitan":
        about["note"] = "trained with causal attention in every block; needs further training"
    if weights.format == "dcp" and (weights.path / MANIFEST).is_file():
        manifest = Manifest.read(weights.path)
        config = architecture.run_config(weights.path) or {}
        if manifest.step or config:
            about["steps"] = manifest.step
            about["images_per_step"] = manifest.facts.global_batch_size
            about["seed"] = manifest.facts.seed
        for section, keys in _RUN_KEYS.items():
            values = config.get(section, {})
            about |= {f"{section}.{key}": values[key] for key in keys if values.get(key)}
    return about
