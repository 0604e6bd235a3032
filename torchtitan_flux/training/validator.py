"""Loss on a fixed held-out set, at fixed times with fixed noise, overall and by time."""

from collections.abc import Callable
from typing import Any

from torchtitan_flux import engine  # noqa: F401, I001  (before torchtitan)
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from torchtitan_flux.data.loader import ValidationLoader
from torchtitan_flux.flow_matching import midpoint_times, mlperf_times

TIME_GRIDS: dict[str, Callable[[], np.ndarray]] = {
    "midpoints": midpoint_times,
    "mlperf": mlperf_times,
}


class FluxValidator:
    """Validation as a training step without a gradient.

    Args:
        loader: held-out samples of this data rank; repeats that fill up batches weigh nothing.
        sample_losses: called as sample_losses(model, batch, t) -> summed squared error of each
            sample [b]; the same flow step that trains.
        times: the fixed times.
        all_times: every time for each sample, or time (index mod count) in turn.
        group: the data ranks, or None for one.
        device: where that group communicates.
        job_config: freq, steps and the last step.
        report: called as report(loss, step, {"validation_metrics/loss_t=…": …}).
    """

    def __init__(
        self,
        loader: ValidationLoader,
        sample_losses: Callable[[nn.Module, dict[str, Tensor], Tensor], Tensor],
        times: np.ndarray,
        all_times: bool,
        group: ProcessGroup | None,
        device: torch.device,
        job_config: Any,
        report: Callable[[float, int, dict[str, float]], None],
    ):
        self.loader = loader
        self.sample_losses = sample_losses
        self.times = times
        self.all_times = all_times
        self.group = group
        self.device = device
        self.job_config = job_config
        self.report = report

    def should_validate(self, step: int) -> bool:
        """Every `validation.freq` steps and at the last (torchtitan's trainer asks)."""
        return step % self.job_config.validation.freq == 0 or step == self.job_config.training.steps

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Measure and report; the same numbers on any number of ranks."""
        loss, by_time = self.measure(model_parts[0])
        by_name = {
            f"validation_metrics/loss_t={t:.4f}": float(value)
            for t, value in zip(self.times, by_time, strict=True)
        }
        self.report(loss, step, by_name)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> tuple[float, np.ndarray]:
        """Mean loss overall, and at each time."""
        count = len(self.times)
        # rows: summed squared error, elements, both by time; float64 on every rank
        sums = torch.zeros(2, count, dtype=torch.float64)
        limit = self.job_config.validation.steps
        for number, batch in enumerate(self.loader):
            if number == limit:
                break
            elements = batch["noise"][0].numel()
            shifts = range(count) if self.all_times else range(1)
            for shift in shifts:
                which = (batch["index"] + shift) % count
                t = torch.from_numpy(self.times)[which].float()
                losses = self.sample_losses(model, batch, t).double().cpu()
                weight = batch["weight"].double()
                sums[0].index_add_(0, which, losses * weight)
                sums[1].index_add_(0, which, weight * elements)
        if self.group is not None:
            on_device = sums.to(self.device)
            torch.distributed.all_reduce(on_device, group=self.group)
            sums = on_device.cpu()
        total = sums.sum(dim=1)
        return float(total[0] / total[1]), (sums[0] / sums[1]).numpy()
