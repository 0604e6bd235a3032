"""What travels with weights: the licence of what they came from, and a model card."""

import re
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from torchtitan_flux.checkpoint.manifest import Manifest
from torchtitan_flux.checkpoint.storage import METADATA
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.paths import locate
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.open import Weights

CARD = "README.md"
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


def companion_files(weights: Weights, name: str) -> dict[str, bytes]:
    """Licences and the model card of a folder called `name`, by file name.

    The licence files of the source come along. A run's weights have the licence of what it began
    with. Derivatives of FLUX.1-dev name its licence.
    """
    origins, runs = _origins(weights.path)
    found = [folder for path in origins for folder in _described(path)]
    files = {
        path.name: path.read_bytes()
        for folder in reversed(found)
        for path in folder.iterdir()
        if path.is_file() and _LICENSE_FILE.match(path.name)
    }
    cards = [_metadata(folder / CARD) for folder in found]
    licenses = [{key: card[key] for key in _LICENSE_KEYS if key in card} for card in cards]
    license = next(filter(None, licenses), {})
    if not license and _derives_from_dev(weights, runs):
        license = _DEV_LICENSE
    about = _provenance(weights)
    data: dict[str, Any] = {"pipeline_tag": "text-to-image", "torchtitan_flux": about, **license}
    files[CARD] = (
        f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n# {name}\n\n"
        f"A FLUX transformer of {sum(map(prod, weights.shapes.values())):,} parameters. "
        "What it comes from: `torchtitan_flux` above.\n"
    ).encode()
    return files


def _described(path: Path) -> list[Path]:
    """Folders whose licence is that of weights: their own and that of their pipeline. That of a
    single file may be of some other project, unless there is a card."""
    if not path.is_dir():
        return [path.parent] if _metadata(path.parent / CARD) else []
    in_pipeline = path.name == "transformer" and (path.parent / "model_index.json").is_file()
    return [path, path.parent] if in_pipeline else [path]


def _metadata(card: Path) -> dict[str, Any]:
    """The front matter of a card; empty where there is none."""
    with suppress(OSError, ValueError, yaml.YAMLError):
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
    if weights.format == "dcp" and (config := architecture.run_config(weights.path)):
        manifest = Manifest.read(weights.path)
        facts = manifest.facts
        about |= {"steps": manifest.step, "seed": facts.seed}
        about["images_per_step"] = facts.global_batch_size
        for section, keys in _RUN_KEYS.items():
            values = config.get(section, {})
            about |= {f"{section}.{key}": values[key] for key in keys if values.get(key)}
    return about
