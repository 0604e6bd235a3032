"""Log lines, TensorBoard and the progress bar: images/s, tokens/s, TFLOP/s, memory, waiting."""

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)
from torchtitan_flux.torchtitan_shim import give_back_freed_memory

import numpy as np
import torch
from torchtitan.components.metrics import (
    BaseLogger,
    LoggerContainer,
    MetricsProcessor,
    TensorBoardLogger,
    _build_metric_logger,
    build_device_memory_monitor,
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

    def __init__(
        self, job_config: FluxJobConfig, parallel_dims: ParallelDims, model_args: FluxModelArgs
    ):
        # not super().__init__: ours counts in images, and colours a terminal only
        self.logger = _build_metric_logger(job_config, _RANK_0)  # type: ignore[arg-type]
        self.parallel_dims = parallel_dims
        self.job_config = job_config
        self.device_memory_monitor = build_device_memory_monitor()
        plain = job_config.metrics.disable_color_printing or not sys.stdout.isatty()
        self.color = utils.NoColor() if plain else utils.Color()
        # not a number on a CPU, and then there is no MFU
        self.gpu_peak_flops = utils.get_peak_flops(self.device_memory_monitor.device_name)
        self.num_flops_per_token = -1
        self.optimizers = None
        self.lr_schedulers = None
        self.model_parts = None

        size, text_tokens = job_config.training.image_size, job_config.encoder.max_t5_encoding_len
        self.tokens_per_image = model_args.geometry.grid(size).tokens + text_tokens
        self.flops_per_image = flops_per_image(model_args, size, text_tokens)
        self.images_since_last_log = 0
        self.data_loading_times: list[float] = []
        self.time_last_log = time.perf_counter()
        self.steps_timed = 0
        self.seconds_timed = 0.0
        self.last_logged_step: int | None = None
        self.bar: tqdm | None = None
        self.device_memory_monitor.reset_peak_stats()

    def start(self, step: int) -> None:
        """Called when training starts, after a checkpoint was loaded."""
        self.last_logged_step = step
        self.time_last_log = time.perf_counter()
        if torch.distributed.get_rank() == 0 and sys.stderr.isatty():
            self.bar = tqdm(
                total=self.job_config.training.steps, initial=step, unit="step", leave=False
            )
            _log_through_bar()

    def advance(self, images: int) -> None:
        """Count one step of `images` images over all ranks."""
        self.images_since_last_log += images
        if self.bar is not None:
            self.bar.update()

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
            extra_metrics: more scalars for TensorBoard; "lr" is in the line, too.
        """
        assert self.last_logged_step is not None
        seconds = time.perf_counter() - self.time_last_log
        steps = step - self.last_logged_step
        images_per_second = self.images_since_last_log / seconds
        tokens_per_second = images_per_second * self.tokens_per_image
        devices = self.parallel_dims.world_size
        tflops = images_per_second * self.flops_per_image / devices / 1e12
        mfu = 100 * tflops * 1e12 / self.gpu_peak_flops
        waiting = 100 * sum(self.data_loading_times) / seconds
        memory = self.device_memory_monitor.get_peak_stats()
        left = self._time_left(step, steps, seconds)

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
        has_mfu = not math.isnan(mfu)
        if has_mfu:
            metrics["mfu(%)"] = mfu
        self.write(metrics, step)

        c = self.color
        mfu_text = f"  mfu: {mfu:.1f}%" if has_mfu else ""
        lr_text = f"lr: {metrics['lr']:.2e}  " if "lr" in metrics else ""
        logger.info(
            f"{c.red}step: {step:5d}  {c.green}loss: {global_avg_loss:8.5f}  "
            f"{c.orange}grad_norm: {grad_norm:7.4f}  {lr_text}"
            f"{c.blue}images/s: {images_per_second:,.2f}  tokens/s: {tokens_per_second:,.0f}  "
            f"{c.cyan}TFLOP/s/device: {tflops:,.3f}{mfu_text}  "
            f"{c.turquoise}memory: {memory.max_reserved_gib:.2f}GiB  "
            f"{c.magenta}data wait: {waiting:.1f}%  left: {left}{c.reset}"
        )
        self._begin_interval(step)

    def log_validation(
        self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None, weights: str = ""
    ) -> None:
        """Validation loss, overall and by time, of the trained weights or of an average's name."""
        section = f"validation_metrics/{weights}/" if weights else "validation_metrics/"
        values = {"loss": loss, **(extra_metrics or {})}
        self.write({section + name: value for name, value in values.items()}, step)
        c, average = self.color, f"  {weights}" if weights else ""
        logger.info(
            f"{c.yellow}validate step: {step:5d}{average}  {c.green}loss: {loss:8.5f}{c.reset}"
        )

    def log_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """A picture [H, W] or [H, W, 3], uint8, into TensorBoard where that is on."""
        formats = "HW" if image.ndim == 2 else "HWC"
        for one in list(self._loggers):
            if isinstance(one, TensorBoardLogger):
                with self._may_fail(one):
                    one.writer.add_image(tag, image, step, dataformats=formats)

    def write(self, metrics: dict[str, Any], step: int) -> None:
        """Scalars into TensorBoard and Weights & Biases, where they are on."""
        for one in list(self._loggers):
            with self._may_fail(one):
                one.log(metrics, step)

    @property
    def _loggers(self) -> list[BaseLogger]:
        return self.logger._loggers if isinstance(self.logger, LoggerContainer) else [self.logger]

    @contextmanager
    def _may_fail(self, one: BaseLogger) -> Iterator[None]:
        """A full disk must not end the run here; TensorBoard's writer fails ever after."""
        try:
            yield
        except OSError as error:
            if not isinstance(one, TensorBoardLogger):
                raise
            why = disk_full(error, Path(self.job_config.job.dump_folder)) or error
            logger.error(
                f"TensorBoard's file could not be written ({why}); no more is, until the run is "
                "started again"
            )
            self._loggers.remove(one)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        super().close()

    def _begin_interval(self, step: int) -> None:
        self.images_since_last_log = 0
        self.data_loading_times.clear()
        self.last_logged_step = step
        self.time_last_log = time.perf_counter()
        self.device_memory_monitor.reset_peak_stats()

    def _time_left(self, step: int, steps: int, seconds: float) -> str:
        if step > 1:  # the first step warms up
            self.steps_timed += steps
            self.seconds_timed += seconds
        if not self.steps_timed:
            return "?"
        left = self.job_config.training.steps - step
        minutes, rest = divmod(round(left * self.seconds_timed / self.steps_timed), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _log_through_bar() -> None:
    """Let log lines scroll above the progress bar instead of through it."""

    class ThroughBar(logging.StreamHandler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(self.format(record), file=sys.stdout)

    for handler in list(logger.handlers):
        through = ThroughBar()
        through.setFormatter(handler.formatter)
        logger.removeHandler(handler)
        logger.addHandler(through)


def build_metrics_processor(
    job_config: FluxJobConfig,
    parallel_dims: ParallelDims,
    model_args: FluxModelArgs,
    tag: str | None = None,
) -> FluxMetrics:
    """torchtitan's MetricsProcessorBuilder."""
    return FluxMetrics(job_config, parallel_dims, model_args)
