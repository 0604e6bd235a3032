"""Time densities, the shift, interpolation in float32, and the one flow step."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from torchtitan_flux.flow_matching import (
    TimeDensity,
    interpolate,
    midpoint_times,
    mlperf_times,
    resolution_mu,
    shift_times,
    squared_errors,
)
from torchtitan_flux.randomness import Stream, generator

DRAWS = np.array([generator(1, Stream.TIME, i).random() for i in range(4000)])
"""As training draws them: one number for each position."""


def ks(values: np.ndarray, cdf) -> float:
    return stats.kstest(values, cdf).pvalue


def test_uniform_times_are_the_draws():
    times = TimeDensity().times(DRAWS, tokens=256)
    assert np.array_equal(times, DRAWS)
    assert ks(times, stats.uniform.cdf) > 0.01


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.6, 1.7)])
def test_logit_normal_times(mean, std):
    times = TimeDensity("logit_normal", mean, std).times(DRAWS, tokens=256)
    assert ks(times, lambda t: stats.norm.cdf(np.log(t / (1 - t)), mean, std)) > 0.01
    assert ks(times, stats.uniform.cdf) < 1e-6
    assert np.array_equal(np.argsort(times), np.argsort(DRAWS))


@pytest.mark.parametrize("name", ["uniform", "logit_normal"])
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_resolution_shift_of_times(name, tokens):
    """A shift by alpha = e^mu adds mu to the logit (arXiv:2403.03206, eq. 23)."""
    plain = TimeDensity(name).times(DRAWS, tokens)
    shifted = TimeDensity(name, resolution_shift=True).times(DRAWS, tokens)
    mu = {256: 0.5, 1024: 0.63, 4096: 1.15}[tokens]
    assert np.abs(np.log(shifted / (1 - shifted)) - np.log(plain / (1 - plain)) - mu).max() < 1e-9


def test_shift_keeps_its_ends_and_is_undone_by_its_inverse():
    t, alpha = np.linspace(0, 1, 101), math.exp(0.9)
    shifted = shift_times(t, alpha)
    assert (shifted[0], shifted[-1]) == (0, 1)
    assert np.allclose(shifted[1:], alpha / (alpha + 1 / t[1:] - 1))
    assert np.allclose(shift_times(shifted, 1 / alpha), t)
    assert np.array_equal(shift_times(t, 1.0), t)
    assert resolution_mu(1024) == pytest.approx(0.63)


def test_extreme_draws_stay_inside():
    """A generator draws from [0, 1): zero is possible."""
    u = np.array([0.0, 2.0**-53, 1 - 2.0**-53])
    for density in (TimeDensity("logit_normal"), TimeDensity("uniform", resolution_shift=True)):
        times = density.times(u, 4096)
        assert np.isfinite(times).all()
        assert (times >= 0).all()
        assert (times <= 1).all()


def test_validation_grids():
    assert midpoint_times().tolist() == [(i + 0.5) / 8 for i in range(8)]
    assert mlperf_times().tolist() == [i / 8 for i in range(8)]
    assert midpoint_times(3).tolist() == pytest.approx([1 / 6, 1 / 2, 5 / 6])


def latents(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(3, 5, 7, 2, generator=rng).to(dtype) for _ in range(2))
    return data, noise, torch.tensor([0.0, 0.3, 1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpolation_is_in_float32(dtype):
    data, noise, t = latents(dtype)
    x_t, target = interpolate(data, noise, t)
    assert x_t.dtype == target.dtype == torch.float32
    exact = noise.double() - data.double()
    assert (target.double() - exact).abs().max() < 1e-6
    w = t.double().view(3, 1, 1, 1)
    assert (x_t.double() - ((1 - w) * data.double() + w * noise.double())).abs().max() < 1e-6
    assert torch.equal(x_t[0], data[0].float())
    assert torch.equal(x_t[2], noise[2].float())
    if dtype == torch.bfloat16:  # in bfloat16 the difference would be off by a thousandth
        assert ((noise - data).double() - exact).norm() / exact.norm() > 1e-3


def test_squared_errors_are_summed_in_float32():
    predicted = torch.full((2, 3000), 1.0, dtype=torch.bfloat16)
    assert squared_errors(predicted, torch.zeros(2, 3000)).tolist() == [3000, 3000]
