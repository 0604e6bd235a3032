"""Loss on a fixed held-out set, at fixed times with fixed noise, overall and by time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torchtitan.tools.logging import logger

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.data.batch import Replacement
from torchtitan_flux.data.loader import ValidationLoader
from torchtitan_flux.flow_matching import midpoint_times, mlperf_times
from torchtitan_flux.training.conditioning import EncodedBatch, Encoders
from torchtitan_flux.training.ema import Weights
from torchtitan_flux.training.metrics import FluxMetrics
from torchtitan_flux.training.quarantine import take_replaced

TIME_GRIDS = {"midpoints": midpoint_times, "mlperf": mlperf_times}


class NoItems(RuntimeError):
    """A held-out set of which nothing can be read: its mean would be nan."""


@torch.no_grad()
def mean_loss(
    loader: ValidationLoader,
    encoders: Encoders,
    losses: Callable[[EncodedBatch, Tensor], Tensor],
    times: np.ndarray,
    all_times: bool,
    limit: int = -1,
    group: ProcessGroup | None = None,
    device: torch.device | str = "cpu",
) -> tuple[float, np.ndarray]:
    """Mean squared velocity error over a fixed set, overall and at each time.

    Args:
        loader: samples of this data rank; repeats that fill up batches weigh nothing.
        encoders: asked once for all times of a batch.
        losses: called as losses(encoded, t) -> summed squared error of each sample [b].
        times: the fixed times.
        all_times: every time for each sample, or time (index mod count) in turn.
        limit: batches that each rank reads, -1 for all.
        group: the data ranks, or None for one.
        device: where that group communicates.
    """
    count = len(times)
    # summed squared errors and elements, both by time; float64 on any number of ranks
    sums = torch.zeros(2, count, dtype=torch.float64)
    for batch in islice(loader, None if limit == -1 else limit):
        elements = batch.noise[0].numel()
        encoded = encoders.encode(batch)
        for shift in range(count) if all_times else range(1):
            which = (batch.position + shift) % count
            t = torch.from_numpy(times)[which].float()
            weight = batch.weight.double()
            sums[0].index_add_(0, which, losses(encoded, t).double().cpu() * weight)
            sums[1].index_add_(0, which, weight * elements)
    if group is not None:
        on_device = sums.to(device)
        torch.distributed.all_reduce(on_device, group=group)
        sums = on_device.cpu()
    total = sums.sum(dim=1)
    if not total[1]:
        raise NoItems("no item of the held-out set can be read; quarantine.jsonl lists them")
    return float(total[0] / total[1]), (sums[0] / sums[1]).numpy()


@dataclass
class FluxValidator:
    """What torchtitan's loop calls to validate.

    Attributes:
        loader: held-out samples of this data rank.
        encoders, losses: called as encoders.encode(batch) and losses(encoded, t), as in training.
        config: sections validation and training.
        group, device: the data ranks and where they communicate.
        metrics: reports, and takes the time out of the throughput.
        report: collective; called with the items that could not be read and their purpose.
        weights: which the loss is measured with, one after another.
    """

    loader: ValidationLoader
    encoders: Encoders
    losses: Callable[[EncodedBatch, Tensor], Tensor]
    config: FluxJobConfig
    group: ProcessGroup | None
    device: torch.device
    metrics: FluxMetrics
    report: Callable[[list[Replacement], str], None]
    weights: Sequence[Weights]

    def should_validate(self, step: int) -> bool:
        """Every `validation.freq` steps and at the last."""
        return step % self.config.validation.freq == 0 or step == self.config.training.steps

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Measure and report; a whole set gives the same numbers on any number of ranks.

        `model_parts` is torchtitan's: `losses` knows the model.
        """
        with self.metrics.pause():
            for name, applied in self.weights:
                with applied():
                    self._validate(name, step)
            self.report(take_replaced(self.loader), "validation")

    def _validate(self, weights: str, step: int) -> None:
        v = self.config.validation
        times = TIME_GRIDS[v.time_grid]()
        try:
            loss, by_time = mean_loss(
                self.loader,
                self.encoders,
                self.losses,
                times,
                v.all_timesteps,
                v.steps,
                self.group,
                self.device,
            )
        except NoItems as error:
            logger.error(f"validate step: {step:5d}  no loss: {error}")
            return
        by_name = {
            f"loss_t={t:.4f}": float(value)
            for t, value in zip(times, by_time, strict=True)
            if not np.isnan(value)  # a short set in turn may miss a time
        }
        self.metrics.log_validation(loss, step, by_name, weights)
