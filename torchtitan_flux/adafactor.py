"""Adafactor on sharded weights; torch's own fails on DTensors (2.13)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from torchtitan_flux.shards import box, laid_out_as

BETA2_DECAY, CLIP, LEAST_SCALE = -0.8, 1.0, 1e-3


class Adafactor(Optimizer):
    """What `torch.optim.Adafactor` computes (arXiv:1804.04235, algorithm 4 and sec. 6 to 8, with
    decoupled weight decay), on every mesh: factors and norms are those of the whole weight.

    Of a matrix each rank keeps the mean squared gradients of all rows and of all columns; of a
    vector, those of its own shard.

    Args:
        parameters: vectors and matrices, sharded or not.
        lr: relative step; multiplied by the root mean square of the weight, at least 1e-3.
        weight_decay: times lr.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, grad: Tensor, lr: float, weight_decay: float) -> None:
        state, eps = self.state[parameter], torch.finfo(parameter.dtype).eps
        if not state:
            state["step"] = torch.tensor(0.0)
            if grad.ndim == 2:
                state["row_var"], state["col_var"] = (_means(grad * 0, dim) for dim in (-1, -2))
            else:
                state["variance"] = torch.zeros_like(grad)
        state["step"] += 1
        step = float(state["step"])
        size = _rms(parameter)
        weight = step**BETA2_DECAY
        if weight_decay:
            parameter.mul_(1 - lr * weight_decay)
        if grad.ndim == 2:
            rows = state["row_var"].lerp_(_means(grad, -1), weight)
            columns = state["col_var"].lerp_(_means(grad, -2), weight)
            rows_here, columns_here = box(parameter)
            scaled = rows[rows_here] / rows.mean().clamp(min=eps)
            variance = laid_out_as(parameter, scaled * columns[:, columns_here])
        else:
            variance = state["variance"].lerp_(grad.square(), weight).clone()
        update = variance.clamp_(min=eps * eps).rsqrt_().mul_(grad)
        rate = torch.clamp(size, min=LEAST_SCALE) * min(lr, step**-0.5)
        parameter.sub_(update * (rate / (_rms(update) / CLIP).clamp(min=1.0)))


def _means(grad: Tensor, dim: int) -> Tensor:
    """Mean squares over a dimension of the whole matrix, which stays with size 1; on every rank."""
    return _full(grad.square().sum(dim, keepdim=True)) / grad.shape[dim]


def _rms(value: Tensor) -> Tensor:
    return (_full(value.square().sum()) / value.numel()).sqrt()


def _full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
