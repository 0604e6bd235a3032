"""Flags that the ranks reduce in every step: stop, not finite, unreadable."""

from collections import deque
from dataclasses import dataclass

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor

from torchtitan_flux.optimizers import FluxOptimizers
from torchtitan_flux.training.transfer import Returning, sent


@dataclass(frozen=True)
class Step:
    """What this rank knows of a step, should it turn out not to be finite.

    Attributes:
        number: of the step.
        positions, losses: of this rank's samples.
        grad_norm: over all ranks.
    """

    number: int
    positions: Int64[Tensor, " samples"]
    losses: Float[Tensor, " samples"]
    grad_norm: Float[Tensor, ""]


@dataclass(frozen=True)
class StepFlags:
    """Flags of a step: each is set where any rank set it."""

    step: Step
    nonfinite: bool
    stop: bool
    unreadable: bool


class FlagExchange:
    """One small sum over all ranks in each step.

    A GPU runs a step behind the host. Reading the sum at once would stall it in every step, so it
    is read one step later.

    Args:
        device: where the ranks communicate.
        late: whether the newest step is left unread until the next one is sent, or everything is
            asked for. Every rank asks in the same step, and so gets the same.
    """

    def __init__(self, device: torch.device, late: bool):
        self.device = device
        self.late = late
        self._unread: deque[tuple[Step, Returning]] = deque()

    def send(self, step: Step, loss: Tensor, stop: bool, unreadable: bool) -> Float[Tensor, ""]:
        """Send what this rank knows after the backward pass; collective, before the optimizer.

        Args:
            step: the step, whose gradient norm is looked at.
            loss: of this rank's samples, a scalar.
            stop: whether it was asked to stop.
            unreadable: whether it met items that cannot be read.

        Returns:
            1 where the loss or the gradient of any rank is not finite, else 0; on the device.
        """
        flags = sent(torch.tensor([0.0, float(stop), float(unreadable)]), self.device)
        flags[0] = ~(torch.isfinite(loss) & torch.isfinite(step.grad_norm))
        if dist.get_world_size() > 1:
            dist.all_reduce(flags)
        self._unread.append((step, Returning(flags)))
        return (flags[0] > 0).float()

    def receive(self, everything: bool) -> list[StepFlags]:
        """Flags of steps not received before, in their order.

        Args:
            everything: the newest step too, where that is otherwise left for later.
        """
        left = 1 if self.late and not everything else 0
        received = []
        while len(self._unread) > left:
            step, flags = self._unread.popleft()
            received.append(StepFlags(step, *(value > 0 for value in flags.read())))
        return received


def step_unless(skip: Float[Tensor, ""], optimizers: FluxOptimizers, seed: int) -> None:
    """One step of the optimizers, or where `skip` is 1 no change: weights, moments, step counts.

    Fused kernels look at `skip` on the device; before the others the host waits to look.

    Args:
        skip: 1 or 0, on the device.
        optimizers: of this rank.
        seed: of stochastic rounding in this step.
    """
    if all(group.get("fused") for optimizer in optimizers for group in optimizer.param_groups):
        for optimizer in optimizers:
            # what GradScaler tells these kernels by; offloaded parameters are on the CPU
            device = optimizer.param_groups[0]["params"][0].device
            optimizer.found_inf = skip.to(device)  # type: ignore[attr-defined]
    elif skip:
        return
    optimizers.step_with(seed)
