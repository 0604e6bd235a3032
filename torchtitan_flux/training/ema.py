"""Exponential moving averages of the weights.

Of step s, with the weights w_s: e_s = decay * e_(s-1) + (1 - decay) * w_s, the average of
arXiv:1412.6980, sec. 7.2, without its correction: until `start` the average is the weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from torchtitan_flux.checkpoint.storage import EMA_PREFIX
from torchtitan_flux.model.initial_values import canonical_name
from torchtitan_flux.parallel.parallelize import reshard
from torchtitan_flux.shards import local
from torchtitan_flux.training.hooks import Hook

Weights = tuple[str, Callable[[], AbstractContextManager[None]]]
"""The name of a set of weights ("" for the trained ones), and the context in which it is used."""

MODEL_ALONE: list[Weights] = [("", nullcontext)]


class Average(Stateful):
    """One average, in float32, sharded like the weights.

    Args:
        parameters: trained ones by canonical name, of this rank's part of the model.
        decay: in [0, 1).
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float):
        self.parameters = dict(parameters)
        self.decay = decay
        self.values = {n: p.detach().float().clone() for n, p in self.parameters.items()}
        self.started = False  # whether it is an average already, of this run or a checkpoint

    @torch.no_grad()
    def update(self, averaging: bool) -> None:
        """Average the weights in; where not `averaging`, or nothing is averaged yet, copy them."""
        weights = [w.float() for w in _local(self.parameters)]
        weight = 1 - self.decay if averaging and self.started else 1.0
        torch._foreach_lerp_(_local(self.values), weights, weight)
        self.started = True

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters have the average's values while inside."""
        weights = _local(self.parameters)
        kept = [w.clone() for w in weights]
        torch._foreach_copy_(weights, _local(self.values))
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)

    def state_dict(self) -> dict[str, Tensor]:
        return self.values

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(state_dict[name])
        self.started = True


class EMA(Hook):
    """The averages of a run.

    Args:
        model_parts: of this rank.
        decays: of each average.
        every: optimizer steps between updates.
        start: the step up to which the average is the weights.
    """

    def __init__(
        self, model_parts: Sequence[nn.Module], decays: Sequence[float], every: int, start: int
    ):
        self.model_parts = model_parts
        self.every = every
        self.start = start
        parameters = {
            canonical_name(name): parameter
            for part in model_parts
            for name, parameter in part.named_parameters()
            if parameter.requires_grad
        }
        self.averages = {repr(decay): Average(parameters, decay) for decay in decays}

    def states(self) -> dict[str, Stateful]:
        return {f"{EMA_PREFIX}{name}": average for name, average in self.averages.items()}

    def after_optimizer_step(self, step: int) -> None:
        averaging = step > self.start
        if not averaging or step % self.every == 0:
            for average in self.averages.values():
                average.update(averaging)

    @contextmanager
    def applied(self, name: str) -> Iterator[None]:
        """The model has the average in place of its weights while inside."""
        self._reshard()
        try:
            with self.averages[name].applied():
                yield
        finally:
            self._reshard()

    def _reshard(self) -> None:
        """Whole weights that FSDP has gathered are out of date."""
        for part in self.model_parts:
            reshard(part)

    def weights(self, use_for: Literal["model", "ema", "both"]) -> list[Weights]:
        """What validation and grids use, the trained weights first."""
        if not self.averages:
            return MODEL_ALONE
        averages = [(f"ema_{name}", partial(self.applied, name)) for name in self.averages]
        return {"model": MODEL_ALONE, "ema": averages, "both": [*MODEL_ALONE, *averages]}[use_for]


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """This rank's shards: no communication."""
    return [local(one).detach() for one in tensors.values()]
