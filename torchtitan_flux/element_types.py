"""Values in another element type, refused where it cannot hold them."""

import torch
from torch import Tensor


class BeyondRange(ValueError):
    """A finite value is beyond what an element type can hold."""


def narrows(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether some values of a floating-point type are beyond another's range."""
    return torch.finfo(source).max > torch.finfo(target).max


def overflows(values: Tensor, result: Tensor) -> bool:
    """Whether a finite value became infinite.

    Args:
        values: floating-point numbers.
        result: the same in another element type.
    """
    if not narrows(values.dtype, result.dtype) or not values.numel():
        return False
    # both ends are NaN where one value is
    if torch.stack(result.aminmax()).isfinite().all():
        return False
    return not torch.equal(result.isfinite(), values.isfinite())


def cast(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`values` in another floating-point type; the same tensor where that is its type.

    Args:
        values: floating-point numbers; infinite ones and NaN stay what they are.
        dtype: of the result.
        name: of the tensor, for the message.

    Raises:
        BeyondRange: names the tensor.
    """
    result = values.to(dtype)
    if overflows(values, result):
        largest = torch.finfo(dtype).max
        raise BeyondRange(
            f"{name} has values that {dtype} cannot hold (beyond {largest:.5g} in size); keep "
            f"{values.dtype}, or take another type with its range"
        )
    return result
