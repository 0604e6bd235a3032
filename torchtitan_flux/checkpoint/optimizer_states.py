"""What a resumed run loads of its optimizer and schedule: moments and numbers of steps.

Rates, betas, weight decay and the shape of the schedule are the configuration's, as in a new run.
"""

from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim.lr_scheduler import LambdaLR
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.components.optimizer import OptimizersContainer


class OptimizerStates(Stateful):
    """Saves all of a torchtitan optimizer; loads its moments and counts, and keeps its settings."""

    def __init__(self, optimizers: OptimizersContainer):
        self._optimizers = optimizers

    def state_dict(self) -> dict[str, Any]:
        return self._optimizers.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # exchanged beforehand: torch decides by these settings where it puts the loaded states
        now = self._optimizers.state_dict().items()
        settings = {name: value for name, value in now if name.startswith("param_groups.")}
        self._optimizers.load_state_dict({**state_dict, **settings})


class ScheduleState(Stateful):
    """Saves all of torchtitan's schedules; loads how many steps were taken, no rates."""

    def __init__(self, schedulers: LRSchedulersContainer):
        self._schedulers = schedulers

    def state_dict(self) -> dict[str, Any]:
        rates = ("base_lrs", "_last_lr")  # tensors where an optimizer compiles its step
        return {
            name: [float(rate) for rate in value] if name in rates else value
            for name, value in self._schedulers.state_dict().items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        steps = state_dict["last_epoch"]
        for scheduler in self._schedulers:
            assert isinstance(scheduler, LambdaLR)
            base = [float(rate) for rate in scheduler.base_lrs]
            rates = [lr * f(steps) for lr, f in zip(base, scheduler.lr_lambdas, strict=True)]
            scheduler.load_state_dict({**state_dict, "base_lrs": base, "_last_lr": rates})
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                if isinstance(group["lr"], Tensor):  # that compiled steps read
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
