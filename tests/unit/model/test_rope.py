"""Rotary angles and time sinusoids stay in float32, also inside a bfloat16 model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import model_inputs, nonzero_model

from torchtitan_flux.model import FLAVORS, FluxModel
from torchtitan_flux.model.rope import apply_rope, rope_table, sinusoid

ARGS = replace(
    FLAVORS["flux-digits"], hidden_size=64, num_heads=2, depth=1, depth_single_blocks=1
)  # axes (8, 12, 12)


def reference_table(ids: torch.Tensor, axes: tuple[int, ...], theta: int) -> torch.Tensor:
    """Angles id * theta^(-2i/d) in float64."""
    angles = [
        np.asarray(ids[..., axis, None], dtype=np.float64)
        * float(theta) ** (-np.arange(0, dim, 2) / dim)
        for axis, dim in enumerate(axes)
    ]
    angle = torch.from_numpy(np.concatenate(angles, axis=-1))
    return torch.stack([angle.cos(), angle.sin()], dim=-1)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("largest", [255, 4097, 1_000_003])
def test_table_equals_float64(dtype, largest):
    ids = torch.randint(0, largest + 1, (2, 37, 3), generator=torch.Generator().manual_seed(0))
    ids[0, 0] = largest
    table = rope_table(ids.to(dtype), ARGS.axes_dim, ARGS.theta)
    assert table.dtype == torch.float32
    expected = reference_table(ids, ARGS.axes_dim, ARGS.theta)
    assert (table.double() - expected).abs().max() < 1e-7


def test_tables_of_a_bf16_model_are_float32():
    """4097 is not a bfloat16 number: a cast of ids or table would show."""
    model = nonzero_model(ARGS).bfloat16()
    tables: list[torch.Tensor] = []
    for block in (*model.double_blocks.values(), *model.single_blocks.values()):
        block.attention.register_forward_pre_hook(lambda _m, inputs: tables.append(inputs[3]))
    inputs = model_inputs(ARGS, b=2, rows=1, cols=11, text=5, seed=0)
    rng = torch.Generator().manual_seed(0)
    img_ids, txt_ids = (
        torch.randint(2049, 4098, (2, tokens, 3), generator=rng).float() for tokens in (11, 5)
    )
    with torch.no_grad():
        model(**{**inputs, "img_ids": img_ids, "txt_ids": txt_ids})
    expected = reference_table(torch.cat([txt_ids, img_ids], dim=1), ARGS.axes_dim, ARGS.theta)
    assert len(tables) == 2
    for table in tables:
        assert table.dtype == torch.float32
        assert (table.double() - expected).abs().max() < 1e-7


def test_rotation_is_by_neighbouring_pairs_and_keeps_dtype():
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 7, 32, generator=rng, dtype=torch.float64)
    ids = torch.randint(0, 5000, (2, 7, 3), generator=rng)
    table = reference_table(ids, ARGS.axes_dim, ARGS.theta)
    as_complex = torch.view_as_complex(x.reshape(2, 3, 7, 16, 2))
    expected = torch.view_as_real(as_complex * torch.view_as_complex(table)).flatten(-2)
    rotated = apply_rope(x.float(), rope_table(ids, ARGS.axes_dim, ARGS.theta))
    assert rotated.dtype == torch.float32
    assert (rotated.double() - expected).abs().max() < 2e-6

    rounded = x.bfloat16()
    rotated = apply_rope(rounded, rope_table(ids, ARGS.axes_dim, ARGS.theta))
    assert rotated.dtype == torch.bfloat16
    # rounded once, at the end: half a unit in the last place of 8 bits
    exact = apply_rope(rounded.float(), table.float()).double()
    assert ((rotated.double() - exact).abs() <= exact.abs() * 2**-8).all()


def test_sinusoid_equals_the_formula():
    t = torch.linspace(-0.5, 1.5, 257)
    angle = 1000 * t.double()[:, None] * 10_000.0 ** (-torch.arange(128).double() / 128)
    expected = torch.cat([angle.cos(), angle.sin()], dim=1)
    assert sinusoid(t).dtype == torch.float32
    # 1000 t is rounded to float32: 6e-5 at 1000
    assert (sinusoid(t).double() - expected).abs().max() < 3e-4


def test_4096_times_stay_distinct_in_a_bf16_model():
    """A cast of the times to bfloat16 leaves 705 of them."""
    model = FluxModel(ARGS).bfloat16()
    seen: list[torch.Tensor] = []
    model.time_in.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    n = 4096
    times = (torch.arange(n) + 0.5) / n
    inputs = model_inputs(ARGS, b=n, rows=1, cols=1, text=1, seed=0)
    with torch.no_grad():
        model(**{**inputs, "timesteps": times})
    (features,) = seen
    assert features.dtype == torch.float32
    assert torch.equal(features, sinusoid(times))
    assert len(torch.unique(features.bfloat16(), dim=0)) == n  # as the first linear sees them
    assert len(torch.unique(sinusoid(times.bfloat16()), dim=0)) == 705
