"""Scales are found and applied; every other quantisation is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from weight_files import SCALINGS, scaled_float8

from torchtitan_flux.tensor_files.quantized import ScaledSource, check_config
from torchtitan_flux.tensor_files.safetensors_file import TensorsFile, UnreadableWeights
from torchtitan_flux.tensor_files.sources import FilesSource

F8 = torch.float8_e4m3fn
STATE = {
    "blocks.0.qkv.weight": torch.randn(6, 4, generator=torch.Generator().manual_seed(1)),
    "blocks.0.qkv.bias": torch.arange(6.0),
    "blocks.1.qkv.weight": torch.randn(6, 4, generator=torch.Generator().manual_seed(2)),
    "norm.scale": torch.ones(4),
}


@pytest.fixture
def stored(tmp_path):
    """A state dict as it is read from a file."""

    def store(tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> ScaledSource:
        save_file(tensors, tmp_path / "it.safetensors", header)
        return ScaledSource(FilesSource([TensorsFile.open(tmp_path / "it.safetensors")]), "it")

    return store


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scales_are_applied(stored, scaling: str):
    tensors, header, numbers = scaled_float8(STATE, scaling)
    source = stored(tensors, header)
    assert source.shapes.keys() == numbers.keys()
    for name, values in numbers.items():
        assert torch.equal(source.whole(name), values), name
    codes = tensors["blocks.0.qkv.weight"].float()
    assert not torch.equal(source.whole("blocks.0.qkv.weight"), codes)


def test_float8_without_scales_and_scales_of_wide_weights(stored):
    """The first is a number like any other; of the second, ComfyUI takes the product too."""
    unscaled = {"a.weight": STATE["blocks.0.qkv.weight"].to(F8), "norm.weight": torch.ones(3)}
    found = stored(unscaled)
    assert found.dtypes["a.weight"] == F8
    assert all(torch.equal(found.whole(n).float(), one.float()) for n, one in unscaled.items())
    scale = torch.tensor([0.5], dtype=torch.bfloat16)
    wide = {"a.weight": torch.full((2, 3), 3.0, dtype=torch.float16), "a.scale_weight": scale}
    assert torch.equal(stored(wide).whole("a.weight"), torch.full((2, 3), 1.5))


def test_a_part_has_its_own_rows_of_the_scale(stored):
    scale = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    matrix = torch.full((4, 3), 2.0).to(F8)
    convolution = matrix[:, :, None, None].clone()
    for weight, scales in ((matrix, scale), (convolution, scale[:, 0].clone())):
        source = stored({"a.weight": weight, "a.weight_scale": scales})
        found = source.part("a.weight", (slice(1, 3), *[slice(None)] * (weight.dim() - 1)))
        assert found.flatten(1).tolist() == [[4.0] * 3, [6.0] * 3]


def test_scales_that_make_numbers_and_not(stored):
    for code, scale in ((100.0, torch.nan), (100.0, torch.inf), (100.0, 1e37)):
        weight = torch.full((2, 2), code).to(F8)
        source = stored({"a.weight": weight, "a.weight_scale": torch.tensor(scale)})
        with pytest.raises(UnreadableWeights, match=r"a\.weight_scale is not finite, or scales"):
            source.whole("a.weight")
    source = stored({"a.weight": torch.ones(2, 2).to(F8), "a.weight_scale": torch.tensor(1e37)})
    assert torch.equal(source.whole("a.weight"), torch.full((2, 2), 1e37))


def codes(dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.ones(6, 4).to(dtype)


def described(**entries: object) -> dict[str, Tensor]:
    text = list(json.dumps(entries).encode())
    return {
        "a.weight": codes(F8),
        "a.weight_scale": torch.ones(()),
        "a.comfy_quant": torch.tensor(text, dtype=torch.uint8),
    }


OTHERS = [
    {"a.weight": codes(torch.int8)},
    {"a.bias": torch.ones(3, dtype=torch.int64)},
    {"a.weight": torch.ones(3), "a.weight.absmax": torch.ones(3)},
    {"a.weight": codes(F8), "a.pre_quant_scale": torch.ones(4)},
    {"a.weight": codes(F8), "a.weight_scale_inv": torch.ones(1, 1)},
    {"a.weight": codes(F8), "a.weight_quantizer._scale": torch.ones(())},
    {"a.weight": codes(F8), "a.weight_scale": torch.ones(6, 2)},
    {"a.weight": codes(F8), "a.weight_scale": codes()},
    {"a.weight": codes(F8), "a.weight_scale": torch.ones(6, 1).to(torch.float8_e8m0fnu)},
    described(format="nvfp4"),
    described(format="float8_e4m3fn", convrot=True),
]


@pytest.mark.parametrize("tensors", OTHERS, ids=lambda one: "-".join(one))
def test_other_quantisations_are_refused(stored, tensors: dict[str, Tensor]):
    with pytest.raises(UnreadableWeights, match=r"^it holds quantised weights .*a\..*give the"):
        stored(tensors)


def without(name: str, **more: Tensor) -> dict[str, Tensor]:
    tensors, _, _ = scaled_float8(STATE, "scale_weight")
    return {one: tensor for one, tensor in tensors.items() if one != name} | more


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without("blocks.1.qkv.scale_weight"), r"the scale of blocks\.1\.qkv\.weight"),
        ({n: t for n, t in without("").items() if "scale_" not in n}, r"the scale of blocks\.0"),
        (
            without("", **{"blocks.0.qkv.weight_scale": torch.ones(())}),
            r"two scales of blocks\.0\.qkv\.weight",
        ),
        (
            {n: t for n, t in described(format="float8_e4m3fn").items() if "scale" not in n},
            r"the scale of a\.weight .* is missing",
        ),
        ({**described(), "a.comfy_quant": codes()}, r"no usable description .* a\.comfy_quant"),
        (described(formats="x"), r"no usable description .* a\.comfy_quant"),
    ],
)
def test_a_file_that_lost_its_scales(stored, tensors: dict[str, Tensor], message: str):
    with pytest.raises(UnreadableWeights, match=message):
        stored(tensors)


def test_what_a_header_says_is_checked(stored):
    tensors = {"a.weight": codes(F8), "a.weight_scale": torch.ones(())}
    for layers, message in (
        ({"layers": {"a": {"format": "nvfp4"}}}, r"a in ComfyUI's nvfp4"),
        ([], "_quantization_metadata that is not usable"),
        ({"layers": 3}, "_quantization_metadata that is not usable"),
    ):
        with pytest.raises(UnreadableWeights, match=message):
            stored(tensors, {"_quantization_metadata": json.dumps(layers)})


def test_scales_of_nothing_stay_for_the_check_of_keys(stored):
    stray = {"a.weight": torch.ones(2, 2), "b.weight_scale": torch.ones(())}
    assert stored(stray).shapes.keys() == stray.keys()


def test_configurations_that_name_a_quantisation():
    for described in ({"quant_method": "bitsandbytes"}, {"bits": 4}, "nf4"):
        with pytest.raises(UnreadableWeights, match=r"weights are quantised .*is not read"):
            check_config({"quantization_config": described})
    for harmless in (None, {"quant_method": "compressed-tensors"}):
        check_config({"quantization_config": harmless})
