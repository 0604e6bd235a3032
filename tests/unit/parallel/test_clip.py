"""Clipping by the norm of all gradients beside torch's own."""

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
from torch import nn

from torchtitan_flux.parallel.clip import clip_gradients


def parameters() -> list[nn.Parameter]:
    """Three with gradients of norm 3.9, and one that took no part."""
    generator = torch.Generator().manual_seed(4)
    found = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (4,), (2, 2, 2), (6,))]
    for parameter in found[:3]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    norm = nn.utils.get_total_norm([p.grad for p in found[:3] if p.grad is not None])
    for parameter in found[:3]:
        assert parameter.grad is not None
        parameter.grad *= 3.9 / norm
    return found


@pytest.mark.parametrize("max_norm", [0.5, 3.8, 4.0])
def test_clipping_is_that_of_torch(max_norm):
    ours, theirs = parameters(), parameters()
    norm = clip_gradients(ours, max_norm)
    assert float(norm) == pytest.approx(float(nn.utils.clip_grad_norm_(theirs, max_norm)), rel=1e-6)
    assert float(norm) == pytest.approx(3.9, rel=1e-6)
    for own, other, before in zip(ours[:3], theirs[:3], parameters(), strict=False):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-6, atol=0)
        assert own.grad is not None
        assert before.grad is not None
        assert torch.equal(own.grad, before.grad) == (max_norm > 3.9)
    assert ours[3].grad is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(value):
    found = parameters()
    assert found[1].grad is not None
    found[1].grad[2] = value
    assert not torch.isfinite(clip_gradients(found, 1.0))
