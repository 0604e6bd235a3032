"""Rotary position embedding over several axes, and the sinusoid of times. All in float32."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rope_table(
    ids: Float[Tensor, "b tokens axes"] | Int[Tensor, "b tokens axes"],
    axes_dim: tuple[int, ...],
    theta: int,
) -> Float[Tensor, "b 1 tokens half 2"]:
    """(cos, sin) of each rotary pair; half = sum(axes_dim) / 2. One row serves all heads.

    Angles are formed in float64, since ids may be large integers, and stored in float32: a table
    in bf16 is off by 0.04 at 256 px and 0.38 at 2048 px (docs/faults.md).
    Source: RoFormer (arXiv:2104.09864, eq. 15), one frequency ladder theta^(-2i/d) per axis.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        frequencies = theta**-exponents
        angles.append(ids[..., axis, None].to(torch.float64) * frequencies)
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float().unsqueeze(1)


def apply_rope(
    x: Float[Tensor, "b heads tokens dim"], table: Float[Tensor, "b 1 tokens half 2"]
) -> Float[Tensor, "b heads tokens dim"]:
    """Rotate neighbouring pairs (x0, x1), (x2, x3) … by the table's angles; keeps x's dtype."""
    pairs = x.float().unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x)


def sinusoid(
    t: Float[Tensor, " b"], dim: int = 256, max_period: float = 10_000.0, scale: float = 1000.0
) -> Float[Tensor, "b dim"]:
    """Sinusoidal embedding of scale * t in float32, cosines first.

    Source: DDPM / ADM timestep embedding (arXiv:2006.11239, app. B) as FLUX.1 uses it.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    frequencies = torch.exp(-math.log(max_period) * exponents)
    angle = (scale * t.float())[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
