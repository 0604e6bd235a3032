"""Euler and guidance without a model."""

import numpy as np
import pytest
import torch

from torchtitan_flux.sampling.euler import euler, guided
from torchtitan_flux.sampling.schedules import DEV, SCHNELL

UNEVEN = np.array([1.0, 0.97, 0.5, 0.499, 0.02, 0.0])
SCHEDULES = {"one step": SCHNELL.times(1, 1024), "shifted": DEV.times(4, 4096), "uneven": UNEVEN}


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, 7, generator=rng), torch.randn(3, 5, 7, generator=rng)


@pytest.mark.parametrize("name", SCHEDULES)
def test_euler_is_exact_on_straight_paths(name):
    """x_t = (1 - t) data + t noise; the velocity is given once as a constant, once as the field
    of a single data point, (x - data) / t, which asks for the right x and t at every step."""
    data, noise = pair(0)
    for velocity in (lambda _x, _t: noise - data, lambda x, t: (x - data) / t.view(-1, 1, 1)):
        assert (euler(velocity, noise, SCHEDULES[name]) - data).abs().max() < 2e-5
    # part of a schedule carries a noised picture on, as image-to-image does
    found = euler(lambda _x, _t: noise - data, 0.4 * data + 0.6 * noise, np.array([0.6, 0.25, 0.0]))
    assert (found - data).abs().max() < 2e-6


def test_euler_meets_each_time_once_in_order():
    seen: list[torch.Tensor] = []
    steps: list[None] = []

    def velocity(x, t):
        assert t.shape == (3,)
        assert t.dtype == x.dtype == torch.float32
        assert not torch.is_grad_enabled()
        seen.append(t)
        return torch.ones_like(x)

    _, noise = pair(1)
    found = euler(velocity, noise.bfloat16(), UNEVEN, on_step=lambda _: steps.append(None))
    assert torch.stack(seen)[:, 0].tolist() == [np.float32(t) for t in UNEVEN[:-1]]
    assert len(steps) == len(UNEVEN) - 1
    assert found.dtype == torch.float32
    assert torch.allclose(found, noise.bfloat16().float() - 1, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5])
def test_guidance_formula(scale):
    x, t = pair(3)[0], torch.tensor([0.1, 0.2, 0.3])

    def conditional(x, t):
        return 2 * x + t.view(-1, 1, 1)

    def unconditional(x, t):
        return x - 3 * t.view(-1, 1, 1)

    expected = (1 - scale) * unconditional(x, t) + scale * conditional(x, t)
    found = guided(conditional, unconditional, scale)(x, t)
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
