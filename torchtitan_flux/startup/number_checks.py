"""Numbers that torch or torchtitan would refuse, or misunderstand, only once a run is under way."""

import math
from collections.abc import Iterator

import torch

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import Problem, violated
from torchtitan_flux.config.schema import get, keys_of

LARGEST = torch.finfo(torch.float32).max
TINY = torch.finfo(torch.float32).tiny
MOST = 2**63 - 1
"""The largest whole number of TOML, and of torch's counters."""
BELOW_ONE = math.nextafter(1, 0)

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
    (0, BELOW_ONE): "optimizer.beta1 optimizer.beta2 data.held_out_share ema.decay",
    (0, LARGEST): "optimizer.lr optimizer.weight_decay flow.guidance sampling.guidance "
    "sampling.classifier_free_guidance_scale score.classifier_free_guidance_scale",
    # 0 would divide 0 where nothing has a gradient yet
    (TINY, LARGEST): "optimizer.eps flow.logit_std",
    (TINY, math.inf): "training.max_norm",
}
"""(smallest, largest) -> keys, or lists of numbers, that must be within; others fit their type."""

RANGE_OF = {key: bounds for bounds, keys in RANGES.items() for key in keys.split()}


def number_problems(config: FluxJobConfig) -> Iterator[Problem]:
    """Numbers that cannot be computed with, of what is switched on."""
    off = set()
    if not config.profiling.enable_profiling:
        off = {f"profiling.{key}" for key in ("profile_freq", "profiler_active", "profiler_warmup")}
    if config.activation_checkpoint.mode != "memory_budget":
        off.add("activation_checkpoint.memory_budget")
    for key in keys_of(type(config)):
        if key.name in off:
            continue
        value = get(config, key.name)
        numbers = value if isinstance(value, list) else [value]
        problems = (_out_of_range(key.name, x) for x in numbers if type(x) in (int, float))
        yield from (Problem(key.name, problem) for problem in dict.fromkeys(problems) if problem)


def _out_of_range(key: str, value: int | float) -> str:
    whole = isinstance(value, int)
    least, most = RANGE_OF.get(key, (-MOST - 1, MOST) if whole else (-LARGEST, LARGEST))
    if least <= value <= most:
        return ""
    if math.isnan(value):
        return "must be a number"
    if most == BELOW_ONE:
        return "must be in [0, 1)"
    if value < least == TINY:
        return "must be positive"
    limit = (
        f"at least {least:g}"
        if value < least
        else f"at most {most if whole else format(most, 'g')}"
    )
    return f"must be {limit}"


def schedule_problems(config: FluxJobConfig) -> Iterator[Problem]:
    """What torchtitan's schedules of the learning rate, the profiler and the loader do not take."""
    steps, total, p = config.training.steps, config.lr_scheduler.total_steps, config.profiling
    period = p.profiler_warmup + p.profiler_active
    yield from violated(
        (
            total is not None and steps > total,
            "training.steps",
            f"is beyond the schedule of the learning rate, lr_scheduler.total_steps = {total}; "
            "raise that, or remove it to take training.steps",
            "lr_scheduler.total_steps",
        ),
        (
            p.enable_profiling and p.profile_freq < period,
            "profiling.profile_freq",
            f"must be at least profiling.profiler_warmup + profiler_active = {period}",
            "profiling.profiler_warmup",
            "profiling.profiler_active",
        ),
    )
    for section, loader in (
        ("training", config.training.dataloader),
        ("validation", config.validation.dataloader),
    ):
        key, factor, workers = f"{section}.dataloader", loader.prefetch_factor, loader.num_workers
        if factor is not None and not workers > 0 < factor:
            yield Problem(
                f"{key}.prefetch_factor",
                f"batches are made ahead by {key}.num_workers = {workers} processes; both must be "
                "at least 1",
                (f"{key}.num_workers",),
            )
