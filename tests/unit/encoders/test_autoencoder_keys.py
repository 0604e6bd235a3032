"""Key maps of the autoencoder: nothing lost, nothing unnamed."""

import pytest
import torch
from diffusers import AutoencoderKL

from torchtitan_flux.encoders.autoencoder import Autoencoder, AutoencoderArgs
from torchtitan_flux.encoders.autoencoder_keys import from_ours, to_ours
from torchtitan_flux.encoders.autoencoder_layers import parameter_shapes
from torchtitan_flux.tensor_files.state_dict_keys import KeyMismatch

ARGS = AutoencoderArgs(ch=32, ch_mult=(1, 3, 1), num_res_blocks=1, z_channels=5)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=rng) for name, shape in parameter_shapes(ARGS).items()
    }


def test_flux_has_244_tensors_in_bfl_naming():
    args = AutoencoderArgs()
    shapes = parameter_shapes(args)
    assert len(shapes) == 244
    with torch.device("meta"):
        assert set(Autoencoder(args).state_dict()) == set(shapes)
    # As in ae.safetensors.
    assert shapes["encoder.conv_in.weight"] == (128, 3, 3, 3)
    assert shapes["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["encoder.down.2.downsample.conv.weight"] == (512, 512, 3, 3)
    assert shapes["encoder.mid.attn_1.proj_out.weight"] == (512, 512, 1, 1)
    assert shapes["encoder.conv_out.weight"] == (32, 512, 3, 3)
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert shapes["decoder.up.3.block.2.conv2.weight"] == (512, 512, 3, 3)
    assert shapes["decoder.up.3.upsample.conv.weight"] == (512, 512, 3, 3)
    assert "decoder.up.0.upsample.conv.weight" not in shapes
    assert shapes["decoder.norm_out.weight"] == (128,)


def test_names_and_shapes_are_those_of_diffusers_at_full_size():
    args = AutoencoderArgs()
    with torch.device("meta"):
        kl = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=args.widths,
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        ours = Autoencoder(args).state_dict()
    expected = {name: value.shape for name, value in kl.state_dict().items()}
    assert {
        name: value.shape for name, value in from_ours("diffusers", ours, args).items()
    } == expected


def test_round_trips_are_bit_equal(weights):
    diffusers = from_ours("diffusers", weights, ARGS)
    back = to_ours("diffusers", diffusers, ARGS)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    again = from_ours("diffusers", back, ARGS)
    assert all(torch.equal(again[name], diffusers[name]) for name in diffusers)
    assert diffusers["encoder.mid_block.attentions.0.to_q.weight"].shape == (32, 32)
    same = to_ours("bfl", from_ours("bfl", weights, ARGS), ARGS)
    assert same.keys() == weights.keys()
    assert all(torch.equal(same[name], weights[name]) for name in weights)


def test_decoder_levels_are_numbered_the_other_way_round(weights):
    diffusers = from_ours("diffusers", weights, ARGS)
    for i in range(3):
        theirs = diffusers[f"decoder.up_blocks.{2 - i}.resnets.1.conv1.weight"]
        assert torch.equal(theirs, weights[f"decoder.up.{i}.block.1.conv1.weight"])


@pytest.mark.parametrize("convert", [to_ours, from_ours])
@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_every_key_that_does_not_fit_is_named(convert, layout, weights):
    given = dict(weights) if convert is from_ours else from_ours(layout, weights, ARGS)
    gone = [next(name for name in given if "norm1" in name), list(given)[-1]]
    for name in gone:
        del given[name]
    bent = next(name for name in given if "conv_in.weight" in name)
    given[bent] = given[bent][:1]
    given["quant_conv.weight"] = torch.zeros(1)
    with pytest.raises(KeyMismatch) as caught:
        convert(layout, given, ARGS)
    assert sorted(caught.value.missing) == sorted(gone)
    assert caught.value.unknown == ["quant_conv.weight"]
    assert len(caught.value.mis_shaped) == 1
    assert bent in caught.value.mis_shaped[0]
    assert all(name in str(caught.value) for name in (*gone, bent, "quant_conv.weight"))
