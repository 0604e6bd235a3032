"""No finite value becomes infinite on its way into another element type."""

import pytest
import torch

from torchtitan_flux.tensor_files.element_types import BeyondRange, cast

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("source", TYPES)
def test_values_up_to_the_largest_and_not_beyond(source: torch.dtype, target: torch.dtype):
    largest = 0.99 * min(torch.finfo(source).max, torch.finfo(target).max)
    within = torch.tensor([[0.0, -largest], [largest, 1.5]], dtype=source)
    assert torch.equal(cast(within, target, "x"), within.to(target))
    if torch.finfo(source).max <= torch.finfo(target).max:
        return
    for beyond in (torch.finfo(source).max, -torch.finfo(source).max):
        within[1, 1] = beyond
        with pytest.raises(BeyondRange, match=rf"^x has values that {target} cannot hold"):
            cast(within, target, "x")


def test_what_is_not_finite_stays_what_it_is():
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0], dtype=torch.float64)
    for target in TYPES:
        torch.testing.assert_close(cast(odd, target, "x"), odd.to(target), equal_nan=True)
    with pytest.raises(BeyondRange):
        cast(torch.tensor([torch.inf, 1e300], dtype=torch.float64), torch.float32, "x")
    assert cast(torch.empty(0, 3), torch.float16, "x").shape == (0, 3)
    same = torch.ones(3)
    assert cast(same, torch.float32, "x") is same
