"""Scales are found and applied; every other quantisation is refused by its name."""

import json

import pytest
import torch
from torch import Tensor
from weight_files import SCALINGS, scaled_float8

from torchtitan_flux.tensor_files.quantized import (
    QuantizedWeights,
    ScaledSource,
    check_config,
    dequantize,
    without_scales,
)
from torchtitan_flux.tensor_files.sources import StateDict

F8 = torch.float8_e4m3fn
STATE = {
    "blocks.0.qkv.weight": torch.randn(6, 4, generator=torch.Generator().manual_seed(1)),
    "blocks.0.qkv.bias": torch.arange(6.0),
    "blocks.1.qkv.weight": torch.randn(6, 4, generator=torch.Generator().manual_seed(2)),
    "norm.scale": torch.ones(4),
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scales_are_applied(scaling: str):
    stored, _, numbers = scaled_float8(STATE, scaling)
    found = dequantize(stored)
    assert found.keys() == numbers.keys()
    for name, values in numbers.items():
        assert torch.equal(found[name], values), name
    assert not torch.equal(found["blocks.0.qkv.weight"], stored["blocks.0.qkv.weight"].float())


def test_float8_without_scales_and_scales_of_wide_weights():
    """The first is a number like any other; of the second, ComfyUI takes the product too."""
    unscaled = {"a.weight": STATE["blocks.0.qkv.weight"].to(F8), "norm.weight": torch.ones(3)}
    found = dequantize(unscaled)
    assert found["a.weight"].dtype == F8
    assert all(torch.equal(found[name].float(), one.float()) for name, one in unscaled.items())
    scale = torch.tensor([0.5], dtype=torch.bfloat16)
    wide = {"a.weight": torch.full((2, 3), 3.0, dtype=torch.float16), "a.scale_weight": scale}
    assert torch.equal(dequantize(wide)["a.weight"], torch.full((2, 3), 1.5))


def test_a_part_has_its_own_rows_of_the_scale():
    scale = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    matrix = torch.full((4, 3), 2.0).to(F8)
    convolution = matrix[:, :, None, None].clone()
    for weight, scales in ((matrix, scale), (convolution, scale[:, 0])):
        source = without_scales(StateDict({"a.weight": weight, "a.weight_scale": scales}), "it")
        found = source.part("a.weight", (slice(1, 3), *[slice(None)] * (weight.dim() - 1)))
        assert found.flatten(1).tolist() == [[4.0] * 3, [6.0] * 3]


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, 1e37])
def test_a_scale_that_makes_no_number(scale: float):
    stored = {"a.weight": torch.full((2, 2), 100.0).to(F8), "a.weight_scale": torch.tensor(scale)}
    with pytest.raises(QuantizedWeights, match=r"^a\.weight_scale is not finite, or scales"):
        dequantize(stored)


def test_a_large_scale_of_small_codes_is_one():
    stored = {"a.weight": torch.ones(2, 2).to(F8), "a.weight_scale": torch.tensor(1e37)}
    assert torch.equal(dequantize(stored)["a.weight"], torch.full((2, 2), 1e37))


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
    ("bitsandbytes 4-bit", {"a.weight.quant_state.bitsandbytes__nf4": codes()}),
    ("bitsandbytes 4-bit", {"a.weight.absmax": torch.ones(3), "a.weight": codes()}),
    ("bitsandbytes 4-bit", {"a.weight.nested_quant_map": torch.ones(3)}),
    ("bitsandbytes int8", {"a.weight": codes(torch.int8), "a.SCB": torch.ones(6)}),
    ("bitsandbytes int8", {"a.weight_format": torch.zeros(1), "a.weight": codes(torch.int8)}),
    ("optimum-quanto", {"a.weight._data": codes(F8), "a.weight._scale": torch.ones(6, 1)}),
    ("torchao", {"a._weight_qdata": codes(torch.int8), "a._weight_scale": torch.ones(6)}),
    ("torchao", {"a.weight:qdata": codes(torch.int8)}),
    ("SVDQuant", {"a.qweight": codes(), "a.wscales": torch.ones(6), "a.smooth": torch.ones(4)}),
    ("NVFP4", {"a.weight": codes(), "a.weight_scale_2": torch.ones(())}),
    ("packed compressed-tensors", {"a.weight_packed": codes(torch.int32)}),
    ("GPTQ or AWQ", {"a.qweight": codes(torch.int32), "a.scales": torch.ones(6)}),
    ("HQQ", {"a.W_q": codes()}),
    ("SDNQ", {"a.weight": codes(), "a.zero_point": torch.ones(6)}),
    ("smoothed", {"a.weight": codes(F8), "a.pre_quant_scale": torch.ones(4)}),
    ("block-wise float8", {"a.weight": codes(F8), "a.weight_scale_inv": torch.ones(1, 1)}),
    ("ModelOpt", {"a.weight": codes(F8), "a.weight_quantizer._scale": torch.ones(())}),
    ("MXFP4", {"experts_blocks": codes(), "experts_scales": codes()}),
    ("codebook", {"a.codes": codes(), "a.codebooks": torch.ones(2, 2)}),
    ("int8 scaled", {"a.weight": codes(torch.int8), "a.scale_weight": torch.ones(6, 1)}),
    ("block-wise scaled", {"a.weight": codes(F8), "a.weight_scale": torch.ones(6, 2)}),
    ("MX", {"a.weight": codes(F8), "a.weight_scale": codes()}),
    ("MX", {"a.weight": codes(F8), "a.weight_scale": torch.ones(6, 1).to(torch.float8_e8m0fnu)}),
    ("quantised or integer", {"a.weight": codes(torch.int8)}),
    ("quantised or integer", {"a.bias": torch.ones(3, dtype=torch.int64)}),
    ("ComfyUI nvfp4", described(format="nvfp4")),
    (
        "ComfyUI int8_tensorwise",
        described(format="int8_tensorwise") | {"a.weight": codes(torch.int8)},
    ),
    ("ComfyUI float8_e4m3fn with convrot", described(format="float8_e4m3fn", convrot=True)),
]


@pytest.mark.parametrize(("kind", "stored"), OTHERS)
def test_other_quantisations_are_refused_by_name(kind: str, stored: dict[str, Tensor]):
    with pytest.raises(QuantizedWeights, match=rf"^holds {kind}.*which are not read.*give the"):
        dequantize(stored)


def without(name: str, **more: Tensor) -> dict[str, Tensor]:
    stored, _, _ = scaled_float8(STATE, "scale_weight")
    return {one: tensor for one, tensor in stored.items() if one != name} | more


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (without("blocks.1.qkv.scale_weight"), r"the scale of blocks\.1\.qkv\.weight is missing"),
        (
            {n: t for n, t in without("").items() if "scale_" not in n},
            r"says by scaled_fp8 .* holds no scales \(scale_weight or weight_scale\)",
        ),
        (
            without("", **{"blocks.0.qkv.weight_scale": torch.ones(())}),
            r"holds two scales of blocks\.0\.qkv\.weight",
        ),
        (
            {
                "a.weight": codes(F8),
                "a.comfy_quant": described(format="float8_e4m3fn")["a.comfy_quant"],
            },
            r"the scale of a\.weight is missing",
        ),
        ({**described(), "a.comfy_quant": codes()}, r"a\.comfy_quant that is no description"),
        (described(formats="x"), r"does not say the format of a\.weight"),
    ],
)
def test_a_file_that_lost_its_scales(stored: dict[str, Tensor], message: str):
    with pytest.raises(QuantizedWeights, match=message):
        dequantize(stored)


def test_a_header_is_about_the_weights_that_are_read():
    """It may speak of other parts of the file, and with a prefix."""

    def find(layers: object) -> ScaledSource:
        source = StateDict({"a.b.weight": codes(F8), "a.b.weight_scale": torch.ones(())})
        source.headers = [{}, {"_quantization_metadata": json.dumps(layers)}]
        return without_scales(source, "it")

    float8, other = {"format": "float8_e4m3fn"}, {"format": "nvfp4"}
    layers = {"model.diffusion_model.a.b": float8, "text_encoders.x.b": other}
    assert find({"layers": layers}).scales == {"a.b.weight": "a.b.weight_scale"}
    with pytest.raises(QuantizedWeights, match=r"ComfyUI nvfp4 weights \(a\.b\.weight\)"):
        find({"layers": {"model.diffusion_model.a.b": other}})
    for spoilt in ([], {"layers": 3}):
        with pytest.raises(QuantizedWeights, match="_quantization_metadata that is not usable"):
            find(spoilt)


def test_scales_of_nothing_stay_for_the_check_of_keys():
    stray = {"a.weight": torch.ones(2, 2), "b.weight_scale": torch.ones(())}
    assert dequantize(stray).keys() == stray.keys()


@pytest.mark.parametrize(
    ("described", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "quanto"}, "quanto"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"bits": 4}, "an unnamed method"),
        ("nf4", "an unnamed method"),
    ],
)
def test_a_configuration_that_names_a_quantisation(described: object, named: str):
    with pytest.raises(QuantizedWeights, match=rf"quantised by {named}, which is not read"):
        check_config({"quantization_config": described})


def test_a_configuration_that_may_mean_scaled_float8():
    for config in ({}, {"quantization_config": None}):
        check_config(config)
    check_config({"quantization_config": {"quant_method": "compressed-tensors"}})
