"""Tiny weights in every format, written by the libraries of others where there are any."""

import json
import math
import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
import torch.distributed.checkpoint as dcp
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import nonzero_model
from safetensors.torch import save_file
from torch import Tensor
from weight_files import diffusers_folder

from torchtitan_flux.checkpoint.manifest import Manifest, RunFacts
from torchtitan_flux.checkpoint.storage import ManifestWriter
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.key_maps import to_layout

TINY = Path(str(resources.files("torchtitan_flux"))) / "assets" / "tiny"
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
FOR_PIPELINE = replace(ARGS, in_channels=64, out_channels=64, vec_in_dim=32, context_in_dim=32)
"""Widths of assets/tiny, so that a pipeline can be made."""
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
        save_file(to_layout("bfl", states, args), path, metadata=architecture.to_metadata(args))
        return path
    if source == "comfyui":
        path = folder / "single.safetensors"
        named = {f"model.diffusion_model.{n}": t for n, t in to_layout("bfl", states, args).items()}
        others = {"vae.decoder.conv_in.bias": torch.ones(3)}
        save_file(named | others, path, metadata=architecture.to_metadata(args))
        return path
    return diffusers_folder(folder, states, args, shards={"diffusers": 1, "sharded": 3}[source])


def pipeline(root: Path, args: FluxModelArgs) -> Path:
    """What FluxPipeline opens, of the tiny encoders and weights of these widths."""
    diffusers_folder(root / "transformer", state_dict(args), args, shards=1)
    parts = {
        "text_encoder": ("clip", "transformers", "CLIPTextModel"),
        "text_encoder_2": ("t5", "transformers", "T5EncoderModel"),
        "tokenizer": ("clip", "transformers", "CLIPTokenizer"),
        "tokenizer_2": ("t5", "transformers", "T5TokenizerFast"),
        "vae": ("vae", "diffusers", "AutoencoderKL"),
    }
    for part, (folder, *_) in parts.items():
        shutil.copytree(TINY / folder, root / part)
    guided = args.guidance_embed  # as FLUX.1-dev, else as FLUX.1-schnell
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if guided else 1.0, use_dynamic_shifting=guided
    )
    scheduler.save_pretrained(root / "scheduler")
    index = {part: theirs for part, (_, *theirs) in parts.items()} | {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def save_checkpoint(folder: Path, args: FluxModelArgs, states: dict[str, Tensor]) -> Path:
    """A full checkpoint of ours as the manager leaves it, optimizer state included."""
    facts = RunFacts(5, 8, args.context_in_dim, args.vec_in_dim, args.in_channels)
    writer = ManifestWriter(folder, Manifest(7, "full", facts))
    optimizer = {f"optimizer.state.{n}.exp_avg": torch.zeros_like(t) for n, t in states.items()}
    dcp.save({**states, **optimizer}, storage_writer=writer, no_dist=True)
    return folder


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
