"""Tiny weights in every format, written by the libraries of others where there are any."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
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


def make(folder: Path, source: str, args: FluxModelArgs, state: Mapping[str, Tensor]) -> Path:
    """Weights in a format; returns the path to open."""
    if source == "dcp":
        return save_checkpoint(folder / "checkpoint" / "step-7", args, state)
    if source == "bfl":
        return bfl_file(folder / "flux1-tiny.safetensors", state, args)
    if source == "comfyui":
        return bfl_file(folder / "single.safetensors", state, args, prefix="model.diffusion_model.")
    return diffusers_folder(folder, state, args, shards={"diffusers": 1, "sharded": 3}[source])


def diffusers_folder(
    folder: Path, state: Mapping[str, Tensor], args: FluxModelArgs, shards: int = 2
) -> Path:
    """Our state dict as `transformer/` of a pipeline, in so many files and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(architecture.to_diffusers_config(args)))
    theirs = to_layout("diffusers", state, args)
    if shards == 1:
        save_file(theirs, folder / "diffusion_pytorch_model.safetensors")
        return folder
    names, weight_map = list(theirs), {}
    for shard in range(shards):
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard::shards]
        save_file({name: theirs[name] for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return folder


def pipeline_root(root: Path, state: Mapping[str, Tensor], args: FluxModelArgs) -> Path:
    """A pipeline folder with nothing but its transformer."""
    diffusers_folder(root / "transformer", state, args)
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def pipeline(root: Path, args: FluxModelArgs) -> Path:
    """What FluxPipeline opens, of the tiny encoders and weights of these widths."""
    pipeline_root(root, state_dict(args), args)
    index = json.loads((root / "model_index.json").read_text())
    for part, folder, library, name in (
        ("text_encoder", "clip", "transformers", "CLIPTextModel"),
        ("text_encoder_2", "t5", "transformers", "T5EncoderModel"),
        ("tokenizer", "clip", "transformers", "CLIPTokenizer"),
        ("tokenizer_2", "t5", "transformers", "T5TokenizerFast"),
        ("vae", "vae", "diffusers", "AutoencoderKL"),
    ):
        shutil.copytree(TINY / folder, root / part)
        index[part] = [library, name]
    guided = args.guidance_embed  # as FLUX.1-dev, else as FLUX.1-schnell
    scheduler = {"shift": 3.0 if guided else 1.0, "use_dynamic_shifting": guided}
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler})
    )
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def bfl_file(
    path: Path, state: Mapping[str, Tensor], args: FluxModelArgs, prefix: str = ""
) -> Path:
    """Our state dict as BFL's file, or with ComfyUI's prefix and something beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {prefix + name: x for name, x in to_layout("bfl", state, args).items()}
    others = {"vae.decoder.conv_in.bias": torch.ones(3)} if prefix else {}
    save_file(tensors | others, path, metadata=architecture.to_metadata(args))
    return path


def torchtitan_checkpoint(folder: Path, state: Mapping[str, Tensor], args: FluxModelArgs) -> Path:
    """A checkpoint of torchtitan 0.2's own FLUX, with what else it saves."""
    theirs = to_layout("torchtitan", state, args)
    more = {
        "train_state.step": torch.tensor(5),
        "optimizer.state.img_in.weight.exp_avg": torch.zeros(3),
    }
    dcp.save(theirs | more, checkpoint_id=folder, no_dist=True)
    return folder


def save_checkpoint(folder: Path, args: FluxModelArgs, state: Mapping[str, Tensor]) -> Path:
    """A full checkpoint of ours as the manager leaves it, optimizer state included."""
    shared = ("context_in_dim", "vec_in_dim", "in_channels", "depth", "depth_single_blocks")
    facts = RunFacts(5, 8, **{name: getattr(args, name) for name in shared})
    writer = ManifestWriter(folder, Manifest(7, "full", facts))
    optimizer = {f"optimizer.state.{n}.exp_avg": torch.zeros_like(t) for n, t in state.items()}
    dcp.save({**state, **optimizer}, storage_writer=writer, no_dist=True)
    return folder


def sparse(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
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


SCALINGS = ("scale_weight", "weight_scale", "rows", "comfy_quant", "header")
"""Ways to write scaled float8: ComfyUI's older and newer one, a scale for each row of a weight,
and the newer one with the format told beside each weight or in the header."""


def scaled_float8(
    state: Mapping[str, Tensor], scaling: str
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Tensor]]:
    """(what a file holds, strings of its header, the numbers that this stands for)."""
    stored, numbers, layers = {}, {}, {}
    for name, values in state.items():
        if values.dim() != 2 or not name.endswith(".weight"):
            stored[name] = numbers[name] = values
            continue
        layer = name.removesuffix(".weight")
        size = values.abs().amax(1, keepdim=True) if scaling == "rows" else values.abs().amax()
        scale = (size / 448).float()
        stored[name] = (values / scale).to(torch.float8_e4m3fn)
        numbers[name] = stored[name].float() * scale
        told = "scale_weight" if scaling == "scale_weight" else "weight_scale"
        stored[f"{layer}.{told}"] = scale
        if scaling == "scale_weight":
            stored[f"{layer}.scale_input"] = torch.ones(())
        if scaling == "rows":
            stored[f"{layer}.input_scale"] = torch.ones(1)
        layers[layer] = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
        if scaling == "comfy_quant":
            text = json.dumps(layers[layer]).encode()
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if scaling == "scale_weight":
        stored["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    described = json.dumps({"format_version": "1.0", "layers": layers})
    header = {"_quantization_metadata": described} if scaling == "header" else {}
    return stored, header, numbers
