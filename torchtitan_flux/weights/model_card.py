"""What travels with weights: the licence of what they came from, and a model card."""

import re
from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from torchtitan_flux.checkpoint.manifest import Manifest
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

    The licence files of the source come along, and those of what its run began with. Derivatives of
    FLUX.1-dev, by their architecture, name its licence, unless their run began with nothing.
    """
    run = architecture.run_config(weights.path) or {}
    begun = run.get("checkpoint", {}).get("initial_load_path")
    folders = [
        folder
        for path in (locate(begun) if begun else None, weights.path)
        if path is not None and path.is_dir()
        for folder in ((path.parent, path) if path.name == "transformer" else (path,))
    ]
    files = {
        path.name: path.read_bytes()
        for folder in folders
        for path in folder.iterdir()
        if path.is_file() and _LICENSE_FILE.match(path.name)
    }
    license: dict[str, Any] = {}
    if (begun or not run) and _is_dev(weights, run):
        license = _DEV_LICENSE
    for folder in folders:
        with suppress(OSError, ValueError, yaml.YAMLError):  # there is no card, or another file
            card = metadata_load(folder / CARD) or {}
            license = {key: card[key] for key in _LICENSE_KEYS if key in card} or license
    about: dict[str, Any] = {"source": f"{weights.path.name} ({weights.format})"}
    if weights.format == "torchtitan":
        about["note"] = "trained with causal attention in every block; needs further training"
    if weights.format == "dcp" and run:
        manifest = Manifest.read(weights.path)
        about |= {"steps": manifest.step, "seed": manifest.facts.seed}
        for section, keys in _RUN_KEYS.items():
            values = run.get(section, {})
            about |= {f"{section}.{key}": values[key] for key in keys if values.get(key)}
    data = ModelCardData(pipeline_tag="text-to-image", torchtitan_flux=about, **license)
    files[CARD] = (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n"
        f"A FLUX transformer of {sum(map(prod, weights.shapes.values())):,} parameters. "
        "What it comes from: `torchtitan_flux` above.\n"
    ).encode()
    return files


def _is_dev(weights: Weights, run: dict[str, Any]) -> bool:
    """Whether weights, or those that their run began with, have FLUX.1-dev's architecture."""
    changed = run.get("checkpoint", {}).get("guidance_weights", "match")
    guided = {"drop": True, "initialize": False}.get(changed, weights.stored.guidance_embed)
    dev, stored = FLAVORS["flux-dev"], weights.stored
    depths = {"depth": dev.depth, "depth_single_blocks": dev.depth_single_blocks}
    return replace(stored, guidance_embed=guided, **depths) == dev
