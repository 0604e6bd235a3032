"""Sizes of the flavors and the arithmetic they take, against published and counted numbers."""

from dataclasses import replace

import pytest
import torch
from helpers import model_inputs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FIXED_WIDTH_FLAVORS, FLAVORS, FluxModel, FluxModelArgs
from torchtitan_flux.model.flops import flops_per_image


def parameters(args: FluxModelArgs) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in FluxModel(args).parameters())


def test_parameter_counts():
    assert parameters(FLAVORS["flux-dev"]) == 11_901_408_320
    assert parameters(FLAVORS["flux-schnell"]) == 11_891_178_560
    assert 50e6 < parameters(FLAVORS["flux-mnist"]) < 52e6
    assert 1.8e6 < parameters(FLAVORS["flux-digits"]) < 2.6e6


@pytest.mark.parametrize("flavor", FIXED_WIDTH_FLAVORS)
@pytest.mark.parametrize(
    ("pixels", "text", "tflop"), [(256, 256, 20.4), (256, 512, 31.0), (512, 512, 64.5),
                                  (1024, 512, 223)]
)  # fmt: skip
def test_work_per_image(flavor, pixels, text, tflop):
    found = flops_per_image(FLAVORS[flavor], pixels, text) / 1e12
    assert found == pytest.approx(tflop, rel=0.01)


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize(("rows", "cols", "text"), [(3, 5, 7), (11, 2, 3)])
def test_work_per_image_equals_the_counted_operations(guidance, rows, cols, text):
    """Exactly, once gradients of the inputs are wanted too (every weight's backward counts 4)
    and attention is spelt out in products: torch's counter passes over the fused kernel of the
    CPU, and takes those of CUDA with the scores computed anew, 14 instead of 12."""
    args = replace(
        FLAVORS["flux-digits"], vec_in_dim=20, context_in_dim=44, mlp_ratio=3.0,
        guidance_embed=guidance,
    )  # fmt: skip
    inputs = model_inputs(args, b=1, rows=rows, cols=cols, text=text, seed=0)
    for name in inputs.keys() - {"img_ids", "txt_ids"}:
        inputs[name].requires_grad_(True)
    model = FluxModel(args)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs).sum().backward()
    size = ImageSize(rows * args.patch_size, cols * args.patch_size)
    assert counter.get_total_flops() == flops_per_image(args, size, text)


def test_work_follows_both_sides_of_the_image():
    args = FLAVORS["flux-dev"]
    wide, tall = ImageSize(256, 1024), ImageSize(1024, 256)
    assert flops_per_image(args, wide, 77) == flops_per_image(args, tall, 77)
    assert flops_per_image(args, wide, 77) == flops_per_image(args, (512, 512), 77)
    with pytest.raises(ValueError, match="height 250"):
        flops_per_image(args, (250, 256), 77)
