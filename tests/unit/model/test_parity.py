"""FluxModel computes what the published model computes: diffusers' FluxTransformer2DModel."""

from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from helpers import diffusers_forward, model_inputs, nonzero_model, relative_l2

from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.weights.key_maps import from_layout, to_layout

ARGS = FluxModelArgs(
    in_channels=12,
    out_channels=12,
    vec_in_dim=20,
    context_in_dim=28,
    hidden_size=96,
    num_heads=3,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(8, 12, 12),
)
ROWS, COLS, TEXT, BATCH = 5, 7, 11, 3


def diffusers_twin(args: FluxModelArgs) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=args.in_channels,
        out_channels=args.out_channels,
        num_layers=args.depth,
        num_single_layers=args.depth_single_blocks,
        attention_head_dim=args.head_dim,
        num_attention_heads=args.num_heads,
        joint_attention_dim=args.context_in_dim,
        pooled_projection_dim=args.vec_in_dim,
        guidance_embeds=args.guidance_embed,
        axes_dims_rope=args.axes_dim,
    )


def pair(guidance: bool, qk_rms: float) -> tuple[FluxModel, FluxTransformer2DModel]:
    """Our model with random weights, and the reference with the same ones."""
    args = replace(ARGS, guidance_embed=guidance)
    ours = nonzero_model(args, seed=1)
    with torch.no_grad():
        if qk_rms != 1.0:  # q and k of rms 1e-3: the epsilon of QK norm decides
            d, heads = args.head_dim, args.num_heads
            for name, p in ours.named_parameters():
                if "qkv_by_head" in name:
                    p.unflatten(0, (heads, 3, d))[:, :2].mul_(qk_rms)
                if "linear1_by_head" in name:
                    p.unflatten(0, (heads, -1))[:, : 2 * d].mul_(qk_rms)
    theirs = diffusers_twin(args)
    theirs.load_state_dict(to_layout("diffusers", ours.state_dict(), args))
    return ours, theirs


@pytest.mark.parametrize("qk_rms", [1.0, 1e-3])
@pytest.mark.parametrize("guidance", [False, True])
def test_forward_and_every_gradient_equal_diffusers(guidance, qk_rms):
    ours, theirs = pair(guidance, qk_rms)
    inputs = model_inputs(ours.args, BATCH, ROWS, COLS, TEXT, seed=2)
    out, reference = ours(**inputs), diffusers_forward(theirs, inputs)
    assert relative_l2(out, reference) <= 2e-6

    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * weights).sum().backward()
    (reference * weights).sum().backward()
    theirs_grads = from_layout(
        "diffusers", {n: p.grad for n, p in theirs.named_parameters()}, ours.args
    )
    for name, parameter in ours.named_parameters():
        assert theirs_grads[name].abs().max() > 1e-6, f"{name} is not tested"
        assert relative_l2(parameter.grad, theirs_grads[name]) <= 2e-4, name


@pytest.mark.parametrize("guidance", [False, True])
def test_bf16_stays_close_to_the_fp32_reference(guidance):
    ours, theirs = pair(guidance, 1.0)
    inputs = model_inputs(ours.args, BATCH, ROWS, COLS, TEXT, seed=2)
    ours.bfloat16(), theirs.bfloat16()
    with torch.no_grad():
        out = ours(**inputs)
        keep = ("timesteps", "guidance", "img_ids", "txt_ids")
        reference = diffusers_forward(
            theirs, {n: x if n in keep else x.bfloat16() for n, x in inputs.items()}
        )
        exact = diffusers_forward(theirs.float(), inputs)  # the rounded weights, computed in fp32
    assert out.dtype == torch.bfloat16
    # diffusers in bf16 is no reference: it is as far from the exact result as we are, or further
    assert relative_l2(out, exact) <= 1.1 * relative_l2(reference, exact)
    assert relative_l2(out, exact) <= 1e-2
