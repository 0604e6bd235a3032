"""The optimizers by name: how each is built, and what it keeps beside a parameter."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import Optimizer as OptimizerSection

from torchtitan_flux.adafactor import Adafactor
from torchtitan_flux.shards import laid_out_as, local

Shape = tuple[int, ...]
Build = Callable[[list[nn.Parameter], OptimizerSection, bool], Optimizer]
BLOCK_8BIT, LEAST_8BIT = 256, 4096
"""Elements that share a scale in torchao's 8-bit moments, and the fewest that are quantised."""


@dataclass(frozen=True)
class OptimizerKind:
    """A row of the table."""

    build: Build
    """Called as build(parameters, section, bf16), bf16 where weights are bfloat16."""
    state_bytes: Callable[[Shape, Shape, int], int]
    """State of a parameter on this rank, from its (global shape, local shape, element size)."""
    torchao: bool = False
    """Whether it needs that library with float32 weights too."""


def _common(section: OptimizerSection) -> dict[str, Any]:
    return {
        "lr": section.lr,
        "betas": (section.beta1, section.beta2),
        "eps": section.eps,
        "weight_decay": section.weight_decay,
    }


def _adam(kind: type[Optimizer]) -> Build:
    def build(parameters: list[nn.Parameter], section: OptimizerSection, bf16: bool) -> Optimizer:
        if bf16:
            from torchao.optim.adam import _AdamW  # with stochastic rounding; no public name

            return _AdamW(parameters, **_common(section), bf16_stochastic_round=True)
        how = {"fused": section.implementation == "fused"}
        how["foreach"] = section.implementation == "foreach"
        return kind(parameters, **_common(section), **how)  # type: ignore[call-arg]

    return build


def _adamw_8bit(parameters: list[nn.Parameter], section: OptimizerSection, bf16: bool) -> Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, **_common(section), bf16_stochastic_round=bf16)


def _adafactor(parameters: list[nn.Parameter], section: OptimizerSection, bf16: bool) -> Optimizer:
    return Adafactor(parameters, section.lr, section.weight_decay)


def _two_moments(whole: Shape, local: Shape, element: int) -> int:
    return 2 * element * math.prod(local)


def _moments_8bit(whole: Shape, local: Shape, element: int) -> int:
    count = math.prod(local)
    if count < LEAST_8BIT or count % BLOCK_8BIT:
        return 2 * element * count
    scales, map_of_codes = 4 * count // BLOCK_8BIT, 4 * 256
    return 2 * (count + scales + map_of_codes)


def _factors(whole: Shape, local: Shape, element: int) -> int:
    """A row and a column of the whole matrix, on every rank; of a vector, this rank's part."""
    if len(whole) < 2:
        return element * math.prod(local)
    return element * (math.prod(whole[:-1]) + math.prod(whole[:-2]) * whole[-1])


OPTIMIZERS = {
    "AdamW": OptimizerKind(_adam(torch.optim.AdamW), _two_moments),
    "Adam": OptimizerKind(_adam(torch.optim.Adam), _two_moments),
    "AdamW8bit": OptimizerKind(_adamw_8bit, _moments_8bit, torchao=True),
    "Adafactor": OptimizerKind(_adafactor, _factors),
}
"""`optimizer.name`. With `training.dtype = "bfloat16"` AdamW and AdamW8bit round stochastically
(torchao); the others keep float32 weights."""

WITH_BF16 = ("AdamW", "AdamW8bit")
"""Optimizers that can keep weights in bfloat16: an update is smaller than half a digit of theirs
most of the time, and would be lost if it were rounded to nearest."""


class FluxOptimizers(OptimizersContainer):
    """torchtitan's container (and its OptimizersBuilder), with the optimizers of the table.

    Checkpoints hold moments in float32 whatever they are kept in: they load on any mesh.
    """

    def __init__(self, model_parts: list[nn.Module], section: OptimizerSection, *_: object):
        self.model_parts = model_parts
        self.optimizers = []
        everything: list[nn.Parameter] = []
        for part in model_parts:
            parameters = [p for p in part.parameters() if p.requires_grad]
            bf16 = any(p.dtype == torch.bfloat16 for p in parameters)
            self.optimizers.append(OPTIMIZERS[section.name].build(parameters, section, bf16))
            everything += parameters
        self._post_init(everything, {"lr": section.lr})

    def step_with(self, seed: int) -> None:
        """One step; where rounding is stochastic, `seed` is all that it depends on.

        Equal on all ranks: those that hold the same shards must round alike.
        """
        if not any(hasattr(one, "bf16_stochastic_round") for one in self.optimizers):
            self.step()
            return
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            self.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: _plain(name, value) for name, value in super().state_dict().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for optimizer in self.optimizers:
            new_buffer = getattr(optimizer, "_new_buffer", None)
            if new_buffer is None:
                continue
            for group in optimizer.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
            for parameter, state in optimizer.state.items():
                for name in ("exp_avg", "exp_avg_sq"):
                    kept = new_buffer(parameter, name == "exp_avg")
                    _quantise(local(state[name]), local(kept))
                    state[name] = kept


def state_bytes(name: str, parameters: Iterable[Tensor]) -> int:
    """What the optimizer of that name keeps beside trained parameters, on this rank."""
    kind = OPTIMIZERS[name]
    return sum(
        kind.state_bytes(tuple(p.shape), tuple(local(p).shape), p.element_size())
        for p in parameters
    )


def _quantise(values: Tensor, kept: Any) -> None:
    """Give a quantised moment values that were one: the same codes, and scales to a last digit.

    torchao takes the largest value of a block for its scale. Of negative ones that is not it: the
    smallest code stands for -0.993, not -1.
    """
    if not hasattr(kept, "codes"):
        kept.copy_(values)
        return
    from torchao.optim.quant_utils import quantize_8bit_with_qmap

    blocks = values.reshape(-1, BLOCK_8BIT)
    largest = blocks.abs().amax(dim=-1)
    scale = torch.where(blocks.amin(dim=-1) == -largest, largest / -kept.qmap[0], largest)
    scale = scale.clip(1e-12) if kept.signed else largest.clip(1e-12)
    codes = quantize_8bit_with_qmap(blocks / scale[:, None], kept.qmap)
    kept.codes.copy_(codes.view(kept.codes.shape))
    kept.scale.copy_(scale)


def _plain(name: str, value: Any) -> Any:
    """A state as checkpoints hold it: quantised moments as float32, a rate as a number."""
    if name.endswith(".lr") and isinstance(value, Tensor):
        return float(value)
    if not isinstance(value, Tensor) or not hasattr(local(value), "codes"):
        return value
    return laid_out_as(value, local(value).dequantize())  # type: ignore[attr-defined]
