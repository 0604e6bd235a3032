"""The autoencoder against diffusers' AutoencoderKL, its keys, and its loading from both formats."""

import json
import shutil
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import relative_l2
from safetensors.torch import load_file, save_file
from torch import Tensor
from weight_files import scaled_float8

from torchtitan_flux.encoders.autoencoder import (
    Autoencoder,
    AutoencoderArgs,
    autoencoder_geometry,
    load_autoencoder,
    to_diffusers,
)
from torchtitan_flux.encoders.autoencoder_layers import parameter_shapes
from torchtitan_flux.encoders.codec import Codec, PixelCodec
from torchtitan_flux.tensor_files.safetensors_file import TensorsFile
from torchtitan_flux.weights.convert_autoencoder import convert_autoencoder

FLUX_NARROW = AutoencoderArgs(ch=32)
"""FLUX.1's autoencoder at a quarter of its width; the widths change at two levels."""
UNLIKE_FLUX = AutoencoderArgs(
    ch=32, ch_mult=(1, 2), num_res_blocks=3, z_channels=5, scale_factor=0.7, shift_factor=-0.2
)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def images(height: int = 40, width: int = 24) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    return torch.rand(2, 3, height, width, generator=rng) * 2 - 1


def build_kl(args: AutoencoderArgs) -> AutoencoderKL:
    """diffusers' autoencoder of a shape."""
    levels = len(args.ch_mult)
    return AutoencoderKL(
        in_channels=args.in_channels,
        out_channels=args.out_ch,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=args.widths,
        layers_per_block=args.num_res_blocks,
        latent_channels=args.z_channels,
        norm_num_groups=32,
        scaling_factor=args.scale_factor,
        shift_factor=args.shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def random_kl(args: AutoencoderArgs) -> AutoencoderKL:
    """Every parameter random, none zero."""
    kl, rng = build_kl(args), torch.Generator().manual_seed(7)
    for name, parameter in kl.requires_grad_(False).named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        noise = torch.randn(parameter.shape, generator=rng)
        parameter.copy_(start + noise / fan_in**0.5)
    return kl.eval()


@pytest.fixture(scope="module")
def kl() -> AutoencoderKL:
    return random_kl(FLUX_NARROW)


@pytest.fixture(scope="module")
def vae_folder(kl, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anything")
    kl.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bfl_file(vae_folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "weights"  # neither name tells the format
    save_file(load_autoencoder(vae_folder).state_dict(), path)
    return path


def test_agrees_with_diffusers(kl, vae_folder: Path):
    autoencoder = load_autoencoder(vae_folder)
    assert autoencoder.args == FLUX_NARROW
    posterior = kl.encode(images()).latent_dist
    latents = (posterior.mode() - 0.1159) * 0.3611
    assert relative_l2(autoencoder.encode(images()), latents) <= 5e-6
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    sample = (posterior.mean + posterior.std * noise - 0.1159) * 0.3611
    assert relative_l2(sample, latents) > 0.1  # the noise is seen
    assert relative_l2(autoencoder.encode(images(), noise), sample) <= 5e-6
    decoded = kl.decode(latents / 0.3611 + 0.1159).sample
    assert relative_l2(autoencoder.decode(latents), decoded) <= 1e-5


def test_agrees_with_diffusers_at_another_shape(tmp_path: Path):
    kl = random_kl(UNLIKE_FLUX)
    kl.save_pretrained(tmp_path)
    autoencoder = load_autoencoder(tmp_path)
    assert autoencoder.args == UNLIKE_FLUX
    latents = autoencoder.encode(images(10, 6))
    assert latents.shape == (2, 5, 5, 3)
    assert relative_l2(latents, (kl.encode(images(10, 6)).latent_dist.mode() + 0.2) * 0.7) <= 5e-6
    assert relative_l2(autoencoder.decode(latents), kl.decode(latents / 0.7 - 0.2).sample) <= 1e-5


def test_log_variance_is_clamped(vae_folder: Path):
    autoencoder = load_autoencoder(vae_folder)
    noise = torch.ones(2, 16, 5, 3)
    for logvar, bound in ((1e4, 20.0), (-1e4, -30.0)):
        autoencoder.encoder.conv_out.weight[16:] = 0.0
        autoencoder.encoder.conv_out.bias[16:] = logvar
        z = (autoencoder.encode(images(), noise) / 0.3611).double()
        spread = (z - autoencoder.encode(images()).double() / 0.3611).mean().item()
        assert spread == pytest.approx(np.exp(bound / 2), rel=1e-3, abs=1e-5)


def test_flux_has_the_names_and_shapes_of_ae_safetensors_and_of_diffusers():
    args = AutoencoderArgs()
    shapes = parameter_shapes(args)
    assert len(shapes) == 244
    assert shapes["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["encoder.down.2.downsample.conv.weight"] == (512, 512, 3, 3)
    assert shapes["encoder.mid.attn_1.proj_out.weight"] == (512, 512, 1, 1)
    assert shapes["encoder.conv_out.weight"] == (32, 512, 3, 3)
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert shapes["decoder.up.3.upsample.conv.weight"] == (512, 512, 3, 3)
    assert "decoder.up.0.upsample.conv.weight" not in shapes
    with torch.device("meta"):
        theirs, ours = build_kl(args).state_dict(), Autoencoder(args).state_dict()
    found = {name: value.shape for name, value in to_diffusers(ours, args).items()}
    assert found == {name: value.shape for name, value in theirs.items()}


def test_both_layouts_load_the_same_and_go_back_bit_equal(kl, vae_folder: Path, bfl_file: Path):
    a, b = load_autoencoder(vae_folder), load_autoencoder(str(bfl_file))
    assert a.args == b.args == FLUX_NARROW
    ours, theirs = a.state_dict(), to_diffusers(b.state_dict(), FLUX_NARROW)
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in ours.items())
    assert theirs.keys() == kl.state_dict().keys()
    assert all(torch.equal(value, kl.state_dict()[name]) for name, value in theirs.items())


def test_every_shape_is_inferred_from_a_bfl_file(tmp_path: Path):
    args = AutoencoderArgs(
        in_channels=4, ch=32, ch_mult=(3, 1), num_res_blocks=1, z_channels=5, out_ch=2
    )
    save_file(Autoencoder(args).state_dict(), tmp_path / "ae.safetensors")
    assert load_autoencoder(tmp_path / "ae.safetensors").args == args
    assert autoencoder_geometry(tmp_path / "ae.safetensors") == (5, 2)


def test_loaded_frozen_in_the_dtype_asked_for(vae_folder: Path):
    autoencoder = load_autoencoder(vae_folder, dtype=torch.bfloat16)
    assert not autoencoder.training
    assert {p.dtype for p in autoencoder.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in autoencoder.parameters())
    exact = load_autoencoder(vae_folder)
    latents = autoencoder.encode(images().requires_grad_())
    assert latents.dtype == torch.float32
    assert not latents.requires_grad
    assert relative_l2(latents, exact.encode(images())) <= 5e-2
    assert relative_l2(autoencoder.decode(latents), exact.decode(latents)) <= 5e-2
    assert autoencoder.encode(images().bfloat16()).dtype == torch.bfloat16


def test_geometry_reads_no_weights(vae_folder: Path, bfl_file: Path, monkeypatch):
    monkeypatch.setattr(TensorsFile, "tensor", None)
    assert autoencoder_geometry(vae_folder) == (16, 8)
    assert autoencoder_geometry(bfl_file) == (16, 8)


def test_scaled_float8_and_a_variant_are_read_as_the_numbers(kl, vae_folder, tmp_path: Path):
    stored, header, numbers = scaled_float8(kl.state_dict(), "rows")
    assert len(stored) > len(numbers), "the attention's matrices have scales"
    for name, state in (("scaled", stored), ("numbers", numbers)):
        shutil.copytree(vae_folder, tmp_path / name)
        save_file(state, tmp_path / name / WEIGHTS, metadata=header)
    weights = tmp_path / "numbers" / WEIGHTS
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    found, expected = (load_autoencoder(tmp_path / name) for name in ("scaled", "numbers"))
    for (name, ours), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_both_codecs_follow_the_protocol():
    with torch.device("meta"):
        autoencoder = Autoencoder(AutoencoderArgs())
    codec, same = PixelCodec(3), torch.rand(2, 3, 5, 7)
    assert isinstance(codec, Codec)
    assert isinstance(autoencoder, Codec)
    assert (autoencoder.channels, autoencoder.downscale, autoencoder.stochastic) == (16, 8, True)
    assert (codec.channels, codec.downscale, codec.stochastic) == (3, 1, False)
    assert torch.equal(codec.encode(same, torch.randn(2, 3, 5, 7)), same)
    assert torch.equal(codec.decode(same), same)


def refused(path: Path, because: str) -> None:
    """By what looks at headers, and by what loads, with its key."""
    with pytest.raises((ValueError, OSError), match=because):
        autoencoder_geometry(path)
    with pytest.raises(ValueError, match=rf"encoder\.autoencoder_path: {path}.*{because}"):
        load_autoencoder(path)


def test_what_is_not_an_autoencoder_is_refused(vae_folder: Path, tmp_path: Path):
    refused(tmp_path / "none.safetensors", "does not exist; give BFL")
    refused(tmp_path, r"config\.json")
    (tmp_path / "text").write_text("<html>")
    refused(tmp_path / "text", "is a web page, not weights")
    # diffusers' weights without their folder
    refused(vae_folder / WEIGHTS, "diffusers vae folder")
    (tmp_path / "config.json").write_text((vae_folder / "config.json").read_text())
    refused(tmp_path, rf"{WEIGHTS} does not exist")
    save_file({"text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(2)}, tmp_path / "ae.sft")
    refused(tmp_path / "ae.sft", "is not an autoencoder in BFL's layout")
    (tmp_path / "link.safetensors").symlink_to("gone")
    refused(tmp_path / "link.safetensors", "is a link to gone, which does not exist")


def test_codes_and_unknown_weights_are_refused(bfl_file: Path, tmp_path: Path):
    state, path = load_file(bfl_file), tmp_path / "ae.safetensors"
    name = "decoder.mid.attn_1.q.weight"
    for changed, because in (
        ({name: state[name].to(torch.int8)}, rf"quantised weights \({name} of torch\.int8\)"),
        ({"decoder.stray": state[name].clone()}, r"1 unknown: decoder\.stray"),
        ({name: state[name][:1].clone()}, rf"1 mis-shaped: {name}"),
    ):
        save_file(state | changed, path)
        refused(path, because)
    del state[name]
    save_file(state, path)
    refused(path, f"1 missing: {name}")


def test_float64_beyond_the_range_is_refused(bfl_file: Path, tmp_path: Path):
    state = {name: tensor.double() for name, tensor in load_file(bfl_file).items()}
    state["decoder.conv_in.bias"][2] = 1e300
    path = tmp_path / "ae.safetensors"
    save_file(state, path)
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.bias has values that .* cannot hold"):
        load_autoencoder(path)
    with pytest.raises(ValueError, match="cannot hold"):
        convert_autoencoder(path, tmp_path / "vae", "diffusers", torch.float16)
    assert not (tmp_path / "vae").exists()


@pytest.mark.parametrize(
    ("change", "because"),
    [
        ({"use_quant_conv": True}, "use_quant_conv is True, supported is False"),
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name is 'FluxTransformer2DModel'"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False"),
        ({"block_out_channels": [64, 96, 128, 128]}, "mis-shaped"),
        ({"block_out_channels": [30, 60, 120, 120]}, "divisible"),
        ({"block_out_channels": 32}, "does not describe a FLUX autoencoder"),
        ({"quantization_config": {"quant_method": "quanto"}}, "quantised .*quanto.* is not read"),
        ({"latent_channels": None}, "latent_channels"),
        ({"use_quant_conv": None}, "use_quant_conv is True"),  # diffusers' default
    ],
)
def test_configurations_not_implemented_are_refused(
    change, because: str, vae_folder: Path, tmp_path: Path
):
    """None takes an entry away."""
    config = {**json.loads((vae_folder / "config.json").read_text()), **change}
    left = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(left))
    (tmp_path / WEIGHTS).symlink_to(vae_folder / WEIGHTS)
    refused(tmp_path, because)
