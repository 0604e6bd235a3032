"""Sampling: classifier-free guidance, Euler. Knows no model, only a velocity callable.

Times descend from 1 (noise) to 0 (data); on a straight path Euler is exact for any schedule.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from torchtitan_flux.flow_matching import Velocity


def guided(conditional: Velocity, unconditional: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance (arXiv:2207.12598): v_uncond + scale * (v_cond - v_uncond)."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        base = unconditional(x, t)
        return base + scale * (conditional(x, t) - base)

    return velocity


@torch.no_grad()
def euler(
    velocity: Velocity,
    noise: Float[Tensor, "b *rest"],
    times: np.ndarray,
    on_step: Callable[[Tensor], object] | None = None,
) -> Float[Tensor, "b *rest"]:
    """Integrate dx/dt = v from noise to data: x <- x + (t_next - t) v, in float32.

    Args:
        velocity: called as velocity(x, t) with t of shape [b].
        noise: where the path begins, at times[0].
        times: descending, as from `Schedule.times`.
        on_step: called with x after each step.
    """
    x = noise.float()
    for t, t_next in pairwise(times):
        t_batch = torch.full((x.shape[0],), float(t), dtype=torch.float32, device=x.device)
        x = x + float(t_next - t) * velocity(x, t_batch).float()
        if on_step is not None:
            on_step(x)
    return x
