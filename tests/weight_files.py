"""Weights as other programs keep them, written here without our own writer."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.weights.architecture import to_diffusers_config
from torchtitan_flux.weights.key_maps import to_layout


def diffusers_folder(
    folder: Path, state: Mapping[str, Tensor], args: FluxModelArgs, shards: int = 2
) -> Path:
    """Our state dict as `transformer/` of a pipeline, in so many files and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_diffusers_config(args)))
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


def bfl_file(
    path: Path, state: Mapping[str, Tensor], args: FluxModelArgs, prefix: str = ""
) -> Path:
    """Our state dict as BFL's file, or with ComfyUI's prefix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + name: x for name, x in to_layout("bfl", state, args).items()}, path)
    return path


def torchtitan_states(state: Mapping[str, Tensor], args: FluxModelArgs) -> dict[str, Tensor]:
    """Our state dict under the names of torchtitan 0.2's own FLUX."""
    theirs = to_layout("bfl", state, args)
    return {name.replace("_norm.scale", "_norm.weight"): x for name, x in theirs.items()}


def torchtitan_checkpoint(folder: Path, state: Mapping[str, Tensor], args: FluxModelArgs) -> Path:
    """A checkpoint of torchtitan 0.2's own FLUX, with what else it saves."""
    more = {"train_state.step": torch.tensor(5)}
    dcp.save(torchtitan_states(state, args) | more, checkpoint_id=folder, no_dist=True)
    return folder


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
