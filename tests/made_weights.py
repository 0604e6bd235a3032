"""Tiny weights in every format, written by the libraries of others where there are any."""

import json
import math
from dataclasses import replace
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
import torch.distributed.checkpoint as dcp
from helpers import nonzero_model
from safetensors.torch import save_file
from torch import Tensor

from torchtitan_flux.checkpoint.manifest import Manifest, RunFacts
from torchtitan_flux.checkpoint.storage import ManifestWriter
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.key_maps import to_bfl, to_diffusers

ARGS = FluxModelArgs(
    in_channels=12,
    out_channels=20,
    vec_in_dim=14,
    context_in_dim=22,
    hidden_size=40,
    num_heads=5,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(2, 2, 4),
)
GUIDED = replace(ARGS, guidance_embed=True)
VARIANTS = {"plain": ARGS, "guided": GUIDED}
SOURCES = ("dcp", "bfl", "comfyui", "diffusers", "sharded")
"""Formats that `make` writes; "sharded" is a diffusers folder in three files."""


def state_dict(args: FluxModelArgs, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights under our names, no two parameters alike."""
    return nonzero_model(args, seed=11).to(dtype).state_dict()


def make(folder: Path, source: str, args: FluxModelArgs, states: dict[str, Tensor]) -> Path:
    """Weights in a format; returns the path to open."""
    folder.mkdir(parents=True, exist_ok=True)
    if source == "dcp":
        return save_checkpoint(folder / "checkpoint" / "step-7", args, states)
    if source == "bfl":
        path = folder / "flux1-tiny.safetensors"
        save_file(to_bfl(states, args), path, metadata=architecture.to_metadata(args))
        return path
    if source == "comfyui":
        path = folder / "single.safetensors"
        named = {f"model.diffusion_model.{n}": t for n, t in to_bfl(states, args).items()}
        others = {"vae.decoder.conv_in.bias": torch.ones(3)}
        save_file(named | others, path, metadata=architecture.to_metadata(args))
        return path
    theirs = to_diffusers(states, args)
    (folder / "config.json").write_text(json.dumps(architecture.to_diffusers_config(args)))
    if source == "diffusers":
        save_file(theirs, folder / "diffusion_pytorch_model.safetensors")
        return folder
    names, table = list(theirs), {}
    for i in range(3):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: theirs[name] for name in names[i::3]}, folder / file)
        table |= dict.fromkeys(names[i::3], file)
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save_checkpoint(folder: Path, args: FluxModelArgs, states: dict[str, Tensor]) -> Path:
    """A full checkpoint of ours as the manager leaves it, optimizer state included."""
    facts = RunFacts(5, 8, args.context_in_dim, args.vec_in_dim, args.in_channels)
    writer = ManifestWriter(folder, Manifest(7, "full", facts))
    optimizer = {f"optimizer.state.{n}.exp_avg": torch.zeros_like(t) for n, t in states.items()}
    dcp.save({**states, **optimizer}, storage_writer=writer, no_dist=True)
    return folder


def torchtitan_states(args: FluxModelArgs, states: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of torchtitan 0.2's own FLUX."""
    theirs = to_bfl(states, args)
    return {
        f"{n.removesuffix('scale')}weight" if n.endswith("_norm.scale") else n: t
        for n, t in theirs.items()
    }


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A file of bf16 zeros that takes no room on the disk."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return path
