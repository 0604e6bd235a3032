"""The autoencoder against diffusers' AutoencoderKL, and its loading from both formats."""

import json
import shutil
from pathlib import Path

import torchtitan_flux.torchtitan_shim

import numpy as np
import pytest
import torch
from helpers import relative_l2
from safetensors.torch import load_file, save_file
from weight_files import scaled_float8

from torchtitan_flux.config.job_config import Encoder, FluxJobConfig
from torchtitan_flux.encoders.autoencoder import (
    Autoencoder,
    AutoencoderArgs,
    autoencoder_geometry,
    load_autoencoder,
)
from torchtitan_flux.encoders.autoencoder_keys import from_ours, to_ours
from torchtitan_flux.encoders.checks import encoder_problems
from torchtitan_flux.tensor_files.safetensors_file import TensorsFile
from torchtitan_flux.weights.convert_autoencoder import (
    convert_autoencoder,
    is_autoencoder,
    open_autoencoder,
)

FLUX_NARROW = AutoencoderArgs(ch=32)
"""FLUX.1's autoencoder at a quarter of its width; the widths change at two levels."""
UNLIKE_FLUX = AutoencoderArgs(
    ch=32, ch_mult=(1, 2), num_res_blocks=3, z_channels=5, scale_factor=0.7, shift_factor=-0.2
)


def images(height: int = 40, width: int = 24) -> torch.Tensor:
    rng = torch.Generator().manual_seed(3)
    return torch.rand(2, 3, height, width, generator=rng) * 2 - 1


@pytest.fixture(scope="module")
def kl(build_kl):
    return build_kl(FLUX_NARROW)


@pytest.fixture(scope="module")
def vae_folder(kl, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("anything")
    kl.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bfl_file(kl, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "weights"  # neither name tells the format
    save_file(
        from_ours("bfl", to_ours("diffusers", kl.state_dict(), FLUX_NARROW), FLUX_NARROW), path
    )
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


def test_agrees_with_diffusers_at_another_shape(build_kl, tmp_path: Path):
    kl = build_kl(UNLIKE_FLUX)
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
        expected = np.exp(bound / 2)
        assert spread == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_bfl_file_and_diffusers_folder_load_the_same(vae_folder: Path, bfl_file: Path):
    a, b = load_autoencoder(vae_folder), load_autoencoder(str(bfl_file))
    assert a.args == b.args == FLUX_NARROW
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


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


@pytest.mark.parametrize("scaling", ["scale_weight", "rows"])
def test_scaled_float8_is_read_as_the_numbers(kl, vae_folder, tmp_path: Path, scaling: str):
    stored, header, numbers = scaled_float8(kl.state_dict(), scaling)
    assert len(stored) > len(numbers), "the attention's matrices have scales"
    for name, state in (("scaled", stored), ("numbers", numbers)):
        shutil.copytree(vae_folder, tmp_path / name)
        save_file(state, tmp_path / name / "diffusion_pytorch_model.safetensors", metadata=header)
    found, expected = (load_autoencoder(tmp_path / name) for name in ("scaled", "numbers"))
    assert autoencoder_geometry(tmp_path / "scaled") == (16, 8)
    for (name, ours), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae.", "module.vae."])
def test_names_behind_a_prefix(kl, vae_folder, bfl_file, tmp_path: Path, prefix: str, refused):
    expected = load_autoencoder(bfl_file).state_dict()
    single, folder = tmp_path / "ae.safetensors", tmp_path / "vae"
    stored = {f"{prefix}{name}": value for name, value in expected.items()}
    save_file(stored, single)
    shutil.copytree(vae_folder, folder)
    scaled, header, _ = scaled_float8(kl.state_dict(), "scale_weight")
    weights = folder / "diffusion_pytorch_model.safetensors"
    save_file(scaled, weights, header)
    unprefixed = load_autoencoder(folder).state_dict()
    save_file({f"{prefix}{name}": value for name, value in scaled.items()}, weights, header)
    for path in (single, folder):
        assert autoencoder_geometry(path) == (16, 8)
        assert load_autoencoder(path).args == FLUX_NARROW
        assert is_autoencoder(path)
    for name, value in load_autoencoder(single).state_dict().items():
        assert torch.equal(value, expected[name]), name
    _, converted = open_autoencoder(single)
    assert all(torch.equal(converted[name], value) for name, value in expected.items())
    for name, value in load_autoencoder(folder).state_dict().items():
        assert torch.equal(value, unprefixed[name]), name
    save_file({**stored, "stray": torch.ones(1)}, single)
    refused(single, ValueError, "is not an autoencoder in BFL's layout")


def test_images_that_do_not_fit_are_refused(vae_folder: Path):
    autoencoder = load_autoencoder(vae_folder)
    with pytest.raises(ValueError, match=r"images of shape \(batch, 3,"):
        autoencoder.encode(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="multiples of 8"):
        autoencoder.encode(torch.zeros(1, 3, 8, 12))
    with pytest.raises(ValueError, match=r"latents of shape \(batch, 16,"):
        autoencoder.decode(torch.zeros(1, 3, 8, 8))


@pytest.fixture(params=[load_autoencoder, autoencoder_geometry])
def refused(request):
    """Asserts that reading a path fails in one way, the message naming path and TOML key."""

    def check(path: Path, error: type[Exception], because: str) -> None:
        with pytest.raises(error, match=because) as caught:
            request.param(path)
        assert "encoder.autoencoder_path" in str(caught.value)
        assert str(path) in str(caught.value)

    return check


def test_what_is_not_an_autoencoder_is_refused(refused, vae_folder: Path, tmp_path: Path):
    refused(tmp_path / "none.safetensors", FileNotFoundError, "does not exist; give BFL")
    refused(tmp_path, FileNotFoundError, r"no config\.json")
    (tmp_path / "text").write_text("<html>")
    refused(tmp_path / "text", ValueError, "is a web page, not weights")
    # diffusers' weights without their folder
    refused(vae_folder / "diffusion_pytorch_model.safetensors", ValueError, "diffusers vae folder")
    (tmp_path / "config.json").write_text((vae_folder / "config.json").read_text())
    refused(tmp_path, FileNotFoundError, r"no diffusion_pytorch_model\.safetensors")


def test_codes_and_unknown_weights_are_refused(refused, bfl_file: Path, tmp_path: Path):
    state, path = load_file(bfl_file), tmp_path / "ae.safetensors"
    name = "decoder.mid.attn_1.q.weight"
    for changed, because in (
        ({name: state[name].to(torch.int8)}, rf"quantised weights \({name} of torch\.int8\)"),
        ({"decoder.stray": state[name].clone()}, r"1 unknown: decoder\.stray"),
        ({name: state[name][:1].clone()}, rf"1 mis-shaped: {name}"),
    ):
        save_file(state | changed, path)
        refused(path, ValueError, because)
    del state[name]
    save_file(state, path)
    refused(path, ValueError, f"1 missing: {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float64_beyond_the_range_is_refused(bfl_file: Path, tmp_path: Path, dtype: torch.dtype):
    state = {name: tensor.double() for name, tensor in load_file(bfl_file).items()}
    state["decoder.conv_in.bias"][2] = 1e300
    save_file(state, tmp_path / "ae.safetensors")
    said = rf"autoencoder_path: .*decoder\.conv_in\.bias has values that {dtype} cannot hold"
    with pytest.raises(ValueError, match=said):
        load_autoencoder(tmp_path / "ae.safetensors", dtype=dtype)
    convert = (tmp_path / "ae.safetensors", tmp_path / "vae", "diffusers", dtype)
    with pytest.raises(ValueError, match="cannot hold"):
        convert_autoencoder(*convert)
    assert not (tmp_path / "vae").exists()


def test_a_variant_is_read_where_it_is_the_only_one(vae_folder: Path, tmp_path: Path):
    shutil.copytree(vae_folder, tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    expected = load_autoencoder(tmp_path / "vae").decoder.conv_in.weight
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert torch.equal(load_autoencoder(tmp_path / "vae").decoder.conv_in.weight, expected)
    variant = tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    variant.write_bytes(variant.read_bytes()[:-7])
    tiny = Path(torchtitan_flux.__file__).parent / "assets" / "tiny"
    paths = {"t5_encoder": str(tiny / "t5"), "clip_encoder": str(tiny / "clip")}
    encoder = Encoder(**paths, autoencoder_path=str(tmp_path / "vae"))
    (problem,) = encoder_problems(FluxJobConfig(encoder=encoder), pixel_space=False)
    assert f"{variant} is no safetensors file, or was cut" in problem.message
    (tmp_path / "link.safetensors").symlink_to("gone")
    with pytest.raises(FileNotFoundError, match="is a link to gone, which does not exist"):
        autoencoder_geometry(tmp_path / "link.safetensors")


@pytest.mark.parametrize(
    ("change", "because"),
    [
        ({"use_quant_conv": True}, "use_quant_conv is True, supported is False"),
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name is 'FluxTransformer2DModel'"),
        ({"norm_num_groups": 16}, "norm_num_groups is 16"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False"),
        ({"block_out_channels": [64, 96, 128, 128]}, "not multiples of the first"),
        ({"block_out_channels": [30, 60, 120, 120]}, "30 is not a positive multiple of 32"),
        ({"block_out_channels": 32}, "does not describe"),
        ({"quantization_config": {"quant_method": "quanto"}}, "quantised .*quanto.*is not read"),
    ],
)
def test_configurations_not_implemented_are_refused(
    refused, change, because: str, vae_folder: Path, tmp_path: Path
):
    config = json.loads((vae_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    refused(tmp_path, ValueError, because)


@pytest.mark.parametrize(
    ("gone", "because"),
    [
        ("latent_channels", "no entry 'latent_channels'"),
        ("use_quant_conv", "use_quant_conv is True"),  # diffusers' default
        (None, "does not describe a FLUX autoencoder"),
    ],
)
def test_broken_configurations_are_refused(refused, gone, because, vae_folder, tmp_path: Path):
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    config = json.loads((vae_folder / "config.json").read_text())
    config.pop(gone, None)
    (tmp_path / "config.json").write_text(json.dumps(config) if gone else "{")
    refused(tmp_path, ValueError, because)
