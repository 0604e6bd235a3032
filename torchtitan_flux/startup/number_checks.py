"""Numbers that torch or torchtitan would refuse, or misunderstand, only once a run is under way."""

import math
from collections.abc import Iterator

import torch

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import Problem
from torchtitan_flux.config.schema import get, keys_of

LARGEST = torch.finfo(torch.float32).max
TINY = torch.finfo(torch.float32).tiny
MOST = 2**63 - 1
"""The largest whole number of TOML, and of torch's counters."""

RANGES: dict[tuple[float, float], str] = {
    (-1, MOST): "checkpoint.load_step",
    (0, MOST): "training.img_height training.img_width training.dataloader.num_workers ema.start "
    "validation.dataloader.num_workers lr_scheduler.warmup_steps comm.trace_buf_size "
    "checkpoint.keep_latest_k inference.img_size profiling.profiler_warmup",
    (1, MOST): "training.local_batch_size training.steps training.gc_freq metrics.log_freq "
    "training.max_nonfinite_steps data.min_image_size data.max_image_pixels checkpoint.interval "
    "encoder.max_t5_encoding_len validation.local_batch_size validation.freq ema.every "
    "sampling.freq sampling.images_per_prompt sampling.denoising_steps sampling.local_batch_size "
    "score.count score.denoising_steps inference.local_batch_size profiling.profiler_active "
    "profiling.profile_freq",
    # seconds; ten times as much, in nanoseconds, is beyond 64 bits
    (1, 10**9): "comm.init_timeout_seconds comm.train_timeout_seconds",
    (-MOST - 1, 2 * MOST + 1): "debug.seed",
    (0, 1): "training.classifier_free_guidance_prob training.flip_prob lr_scheduler.decay_ratio "
    "lr_scheduler.min_lr_factor data.max_unreadable_share activation_checkpoint.memory_budget",
    (0, math.nextafter(1, 0)): "optimizer.beta1 optimizer.beta2 data.held_out_share ema.decay",
    (0, LARGEST): "optimizer.lr optimizer.weight_decay flow.guidance sampling.guidance "
    "sampling.classifier_free_guidance_scale score.classifier_free_guidance_scale",
    # 0 would divide 0 where nothing has a gradient yet
    (TINY, LARGEST): "optimizer.eps flow.logit_std",
    (TINY, math.inf): "training.max_norm",
}
"""(smallest, largest) -> keys, or lists of numbers, that must be within; others fit their type."""

RANGE_OF = {key: bounds for bounds, keys in RANGES.items() for key in keys.split()}


def number_problems(config: FluxJobConfig) -> Iterator[Problem]:
    """Numbers that cannot be computed with."""
    for key in keys_of(type(config)):
        value = get(config, key.name)
        for number in value if isinstance(value, list) else [value]:
            whole = (-MOST - 1, MOST) if isinstance(number, int) else (-LARGEST, LARGEST)
            least, most = RANGE_OF.get(key.name, whole)
            if type(number) in (int, float) and not least <= number <= most:
                yield Problem(key.name, f"must be a number from {least} to {most}")
                break
