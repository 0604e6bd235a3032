"""Element types: their names in safetensors, and values in another one, if that can hold them."""

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names in a header of safetensors, those of quantised files among them."""


class BeyondRange(ValueError):
    """A finite value is beyond what an element type can hold."""


def narrows(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether some values of a floating-point type are beyond another's range."""
    return torch.finfo(source).max > torch.finfo(target).max


def overflows(values: Tensor, result: Tensor) -> bool:
    """Whether a finite value became infinite in `result`, the same in another element type."""
    if not narrows(values.dtype, result.dtype) or not values.numel():
        return False
    # both ends are NaN where one value is
    if torch.stack(result.aminmax()).isfinite().all():
        return False
    return not torch.equal(result.isfinite(), values.isfinite())


def cast(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`values` in another floating-point type; the same tensor where that is its type.

    Infinite values and NaN stay what they are. Raises BeyondRange, naming the tensor.
    """
    result = values.to(dtype)
    if overflows(values, result):
        raise BeyondRange(
            f"{name} has values that {dtype} cannot hold (beyond {torch.finfo(dtype).max:.5g} in "
            f"size); keep {values.dtype}, or take another type with its range"
        )
    return result
