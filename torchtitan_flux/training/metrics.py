"""Log lines and TensorBoard: images/s, tokens/s, TFLOP/s, memory, waiting."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)
from torchtitan_flux.torchtitan_shim import give_back_freed_memory

import numpy as np
from torchtitan.components.metrics import (
    BaseLogger,
    LoggerContainer,
    MetricsProcessor,
    TensorBoardLogger,
)
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils
from torchtitan.tools.logging import logger
from tqdm import tqdm

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.files import disk_full
from torchtitan_flux.model import FluxModelArgs, flops_per_image

_RANK_0 = SimpleNamespace(pp_enabled=False)
"""Every pipeline rank knows the loss, so the first one logs; torchtitan would take the last."""


class FluxMetrics(MetricsProcessor):
    """torchtitan's metrics, counted in images.

    Rates are of the whole job unless they say "per device". Time spent in validation and
    sampling is taken out of them.
    """

    job_config: FluxJobConfig  # type: ignore[assignment]

    def __init__(
        self, job_config: FluxJobConfig, parallel_dims: ParallelDims, model_args: FluxModelArgs
    ):
        super().__init__(job_config, _RANK_0)  # type: ignore[arg-type]
        self.parallel_dims = parallel_dims
        if not sys.stdout.isatty():
            self.color = utils.NoColor()
        size, text_tokens = job_config.training.image_size, job_config.encoder.max_t5_encoding_len
        self.tokens_per_image = model_args.geometry.grid(size).tokens + text_tokens
        self.flops_per_image = flops_per_image(model_args, size, text_tokens)
        self.images_since_last_log = 0
        self.steps_timed = 0
        self.seconds_timed = 0.0
        self.last_logged_step: int | None = None

    def start(self, step: int) -> None:
        """Called when training starts, after a checkpoint was loaded."""
        self.last_logged_step = step
        self.time_last_log = time.perf_counter()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside (validation, sampling) does not count against throughput."""
        utils.device_module.synchronize()  # what the training step queued is training time
        begin = time.perf_counter()
        try:
            yield
        finally:
            give_back_freed_memory()
            self.time_last_log += time.perf_counter() - begin

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """One log line and one row in TensorBoard.

        Args:
            step: the step just done.
            global_avg_loss: mean squared velocity error over the global batch.
            global_max_loss: the largest mean of one rank.
            grad_norm: before clipping.
            extra_metrics: more scalars; "lr" is in the log line, too.
        """
        assert self.last_logged_step is not None
        seconds = time.perf_counter() - self.time_last_log
        steps = step - self.last_logged_step
        images_per_second = self.images_since_last_log / seconds
        tokens_per_second = images_per_second * self.tokens_per_image
        tflops = images_per_second * self.flops_per_image / self.parallel_dims.world_size / 1e12
        mfu = 100 * tflops * 1e12 / self.gpu_peak_flops  # not a number on a CPU
        waiting = 100 * sum(self.data_loading_times) / seconds
        memory = self.device_memory_monitor.get_peak_stats()

        metrics = {
            "loss_metrics/global_avg_loss": global_avg_loss,
            "loss_metrics/global_max_loss": global_max_loss,
            "grad_norm": grad_norm,
            "throughput/images_per_second": images_per_second,
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/tflops_per_device": tflops,
            "time_metrics/seconds_per_step": seconds / steps,
            "time_metrics/data_wait(%)": waiting,
            "memory/max_reserved(GiB)": memory.max_reserved_gib,
            **(extra_metrics or {}),
        }
        mfu_text = lr_text = ""
        if not math.isnan(mfu):
            metrics["mfu(%)"] = mfu
            mfu_text = f"  mfu: {mfu:.1f}%"
        if "lr" in metrics:
            lr_text = f"lr: {metrics['lr']:.2e}  "
        self.write(metrics, step)

        c = self.color
        logger.info(
            f"{c.red}step: {step:5d}  {c.green}loss: {global_avg_loss:8.5f}  "
            f"{c.orange}grad_norm: {grad_norm:7.4f}  {lr_text}"
            f"{c.blue}images/s: {images_per_second:,.2f}  tokens/s: {tokens_per_second:,.0f}  "
            f"{c.cyan}TFLOP/s/device: {tflops:,.3f}{mfu_text}  "
            f"{c.turquoise}memory: {memory.max_reserved_gib:.2f}GiB  {c.magenta}"
            f"data wait: {waiting:.1f}%  left: {self._time_left(step, steps, seconds)}{c.reset}"
        )
        self.images_since_last_log = 0
        self.data_loading_times.clear()
        self.last_logged_step = step
        self.time_last_log = time.perf_counter()
        self.device_memory_monitor.reset_peak_stats()

    def log_validation(
        self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None, weights: str = ""
    ) -> None:
        """Validation loss, overall and by time; `weights` names an average, "" those trained."""
        section = f"validation_metrics/{weights}/" if weights else "validation_metrics/"
        values = {"loss": loss, **(extra_metrics or {})}
        self.write({section + name: value for name, value in values.items()}, step)
        c, average = self.color, f"  {weights}" if weights else ""
        logger.info(
            f"{c.yellow}validate step: {step:5d}{average}  {c.green}loss: {loss:8.5f}{c.reset}"
        )

    def log_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """A picture [H, W] or [H, W, 3], uint8, into TensorBoard where that is on."""

        def add(backend: BaseLogger) -> None:
            if isinstance(backend, TensorBoardLogger):
                formats = "HW" if image.ndim == 2 else "HWC"
                backend.writer.add_image(tag, image, step, dataformats=formats)

        self._on_backends(add)

    def write(self, metrics: dict[str, Any], step: int) -> None:
        """Scalars into TensorBoard and Weights & Biases, where they are on."""
        self._on_backends(lambda backend: backend.log(metrics, step))

    def _on_backends(self, call: Callable[[BaseLogger], None]) -> None:
        """A full disk must not end the run here; TensorBoard's writer fails from then on."""
        backends = self.logger._loggers if isinstance(self.logger, LoggerContainer) else []
        for backend in list(backends):
            try:
                call(backend)
            except OSError as error:
                if not isinstance(backend, TensorBoardLogger):
                    raise
                why = disk_full(error, Path(self.job_config.job.dump_folder)) or error
                logger.error(
                    f"TensorBoard's file could not be written ({why}); nothing more is written to "
                    "it until the run is restarted"
                )
                backends.remove(backend)

    def _time_left(self, step: int, steps: int, seconds: float) -> str:
        if step > 1:  # the first step warms up
            self.steps_timed += steps
            self.seconds_timed += seconds
        if not self.steps_timed:
            return "?"
        left = self.job_config.training.steps - step
        return tqdm.format_interval(left * self.seconds_timed / self.steps_timed)
