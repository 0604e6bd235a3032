"""Rectified flow: time densities, resolution shift, interpolation, velocity target, loss.

Convention (arXiv:2403.03206, sec. 3): t = 0 is data, t = 1 is noise, x_t = (1 - t) x_0 + t eps,
and the model predicts the velocity v = eps - x_0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""velocity(x, t) with t of shape [b] -> what x moves by per unit of time, shaped like x."""
Errors = Callable[[Tensor, Tensor], Tensor]
"""errors(predicted, target) -> summed squared error of each sample [b]."""

SHIFT_BASE = (256, 0.5)
SHIFT_MAX = (4096, 1.15)


def resolution_mu(
    tokens: int, base: tuple[int, float] = SHIFT_BASE, max: tuple[int, float] = SHIFT_MAX
) -> float:
    """mu of a shift by resolution: linear in packed image tokens, through two points (tokens, mu).

    Source: BFL flux, `sampling.get_lin_function`; the same numbers as diffusers'
    `calculate_shift`. The defaults are FLUX.1-dev's.
    """
    (x1, y1), (x2, y2) = base, max
    return y1 + (y2 - y1) * (tokens - x1) / (x2 - x1)


def shift_times(t: np.ndarray, alpha: float) -> np.ndarray:
    """Move times in [0, 1] towards noise: alpha t / (1 + (alpha - 1) t), float64.

    Source: arXiv:2403.03206, eq. 23. The shift alpha is e^mu; 1 leaves times unchanged.
    """
    t = np.asarray(t, dtype=np.float64)
    return alpha * t / (1 + (alpha - 1) * t)


@dataclass(frozen=True)
class TimeDensity:
    """How a uniform draw becomes a training time.

    Attributes:
        name: "uniform", or "logit_normal" (arXiv:2403.03206, sec. 3.1).
        mean: of the normal whose sigmoid is taken, for logit_normal.
        std: its standard deviation.
        resolution_shift: shift times by the number of packed tokens, as FLUX.1-dev samples.
    """

    name: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    resolution_shift: bool = False

    def times(self, u: np.ndarray, tokens: int) -> np.ndarray:
        """Times in (0, 1) of uniform draws u in (0, 1), float64, by the inverse CDF; `tokens` are
        packed image tokens, for the resolution shift."""
        t = np.asarray(u, dtype=np.float64)
        if self.name == "logit_normal":
            normal = torch.special.ndtri(torch.from_numpy(t)).numpy()
            t = 1 / (1 + np.exp(-(self.mean + self.std * normal)))
        return shift_times(t, math.exp(resolution_mu(tokens))) if self.resolution_shift else t


def midpoint_times(count: int = 8) -> np.ndarray:
    """Validation grid of torchtitan's FLUX: (i + 1/2) / count."""
    return (np.arange(count) + 0.5) / count


def mlperf_times(count: int = 8) -> np.ndarray:
    """Validation grid of the MLPerf FLUX.1 benchmark: i / count."""
    return np.arange(count) / count


def interpolate(
    data: Float[Tensor, "b *rest"], noise: Float[Tensor, "b *rest"], t: Float[Tensor, " b"]
) -> tuple[Float[Tensor, "b *rest"], Float[Tensor, "b *rest"]]:
    """x_t = (1 - t) data + t noise and the velocity target v = noise - data.

    In float32 whatever the inputs are: bf16 costs 1.8e-3.
    """
    data, noise = data.float(), noise.float()
    t = t.float().view(-1, *(1,) * (data.ndim - 1))
    return (1 - t) * data + t * noise, noise - data


def squared_errors(
    predicted: Float[Tensor, "b *rest"], target: Float[Tensor, "b *rest"]
) -> Float[Tensor, " b"]:
    """Sum of squared errors of each sample, in float32."""
    return (predicted.float() - target.float()).square().flatten(1).sum(dim=1)


def standard_normal(
    generator: np.random.Generator, shape: tuple[int, ...]
) -> Float[Tensor, "*shape"]:
    """Standard normal float32 tensor from an addressed generator (randomness.generator)."""
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
