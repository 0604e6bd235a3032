"""A transformer in scaled float8: the same as the file of the numbers that it stands for."""

import json
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
import weight_files as made
from safetensors.torch import save_file
from torch import Tensor

from torchtitan_flux.model import FluxModel
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.convert import convert
from torchtitan_flux.weights.key_maps import from_layout, to_layout
from torchtitan_flux.weights.open import import_weights, open_weights

SINGLE = "diffusion_pytorch_model.safetensors"
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return made.state_dict(made.GUIDED)


def write(folder: Path, format: str, scaling: str, state: dict[str, Tensor]):
    """(path, the numbers under our names)."""
    folder.mkdir(exist_ok=True)
    ours = architecture.to_metadata(made.GUIDED)
    if format == "diffusers":
        stored, header, numbers = made.scaled_float8(
            to_layout("diffusers", state, made.GUIDED), scaling
        )
        save_file(stored, folder / SINGLE, metadata=header)
        config = architecture.to_diffusers_config(made.GUIDED)
        if scaling == "rows":
            config["quantization_config"] = {"quant_method": "compressed-tensors"}
        (folder / "config.json").write_text(json.dumps(config))
        return folder, from_layout("diffusers", numbers, made.GUIDED)
    stored, header, numbers = made.scaled_float8(to_layout("bfl", state, made.GUIDED), scaling)
    if format == "comfyui":  # the marker is found with and without the prefix
        stored = {n if n == "scaled_fp8" else PREFIX + n: t for n, t in stored.items()}
        stored["vae.decoder.conv_in.bias"] = torch.ones(3)
    save_file(stored, folder / "flux1-scaled.safetensors", metadata=header | ours)
    return folder / "flux1-scaled.safetensors", from_layout("bfl", numbers, made.GUIDED)


@pytest.mark.parametrize("scaling", made.SCALINGS)
@pytest.mark.parametrize("format", ["bfl", "comfyui", "diffusers"])
def test_every_part_of_every_parameter(tmp_path, state, format: str, scaling: str):
    """Ranks read parts of rows and of columns, which the layouts permute."""
    path, numbers = write(tmp_path, format, scaling, state)
    weights = open_weights(path)
    assert weights.shapes == {name: tuple(t.shape) for name, t in numbers.items()}
    assert set(weights.dtypes.values()) == {torch.float32}
    for name, expected in numbers.items():
        rows, columns = len(expected), expected.shape[-1]
        boxes = [(slice(rows // 3, rows),), (slice(3, 4),)]
        if expected.dim() == 2:
            boxes = [(*one, slice(columns // 4, columns - 1)) for one in boxes]
        assert torch.equal(weights.read(name), expected), name
        for box in boxes:
            assert torch.equal(weights.read(name, box), expected[box]), (name, box)
    convert(weights, tmp_path / "made", "dcp", verify=True)
    name = "img_in.weight"
    assert torch.equal(open_weights(tmp_path / "made").read(name), numbers[name])
    assert not torch.equal(numbers[name], state[name]), "rounding to float8 is seen"


# ---- refused -------------------------------------------------------------------------------


def test_what_is_quantised_otherwise_is_named_before_anything_else(tmp_path, state):
    """Packed codes have other shapes, which would be taken for another model's."""
    theirs = to_layout("bfl", state, made.GUIDED)
    name = "double_blocks.0.img_attn.proj.weight"
    theirs[name] = torch.zeros(theirs[name].numel() // 2, 1, dtype=torch.uint8)
    theirs[f"{name}.absmax"] = torch.ones(25)
    path = tmp_path / "flux1-nf4.safetensors"
    save_file(theirs, path)
    with pytest.raises(UnreadableWeights, match=r"nf4.safetensors holds quantised weights"):
        open_weights(path)


def test_config_of_a_folder_names_the_method(tmp_path, state):
    path, _ = write(tmp_path, "diffusers", "header", state)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnreadableWeights, match=r"config\.json .*quantised .*bitsandbytes"):
        open_weights(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float64_beyond_the_range_is_refused_on_every_way(tmp_path, state, dtype: torch.dtype):
    theirs = {name: t.double() for name, t in to_layout("bfl", state, made.GUIDED).items()}
    theirs["single_blocks.1.linear1.weight"][1, 2] = 1e300
    path = tmp_path / "flux1-wide.safetensors"
    save_file(theirs, path, metadata=architecture.to_metadata(made.GUIDED))
    weights = open_weights(path)
    said = rf"single_blocks\.1\.linear1\.weight has values that {dtype} cannot hold"
    with pytest.raises(UnreadableWeights, match=said):
        weights.read("single_blocks.1.linear1_by_head.weight", dtype=dtype)
    with pytest.raises(UnreadableWeights, match=said):
        convert(path, tmp_path / "no", "diffusers", dtype=dtype)
    with pytest.raises(UnreadableWeights, match=said):
        import_weights(dict(FluxModel(made.GUIDED).to(dtype).named_parameters()), weights)
    assert not (tmp_path / "no").exists()
