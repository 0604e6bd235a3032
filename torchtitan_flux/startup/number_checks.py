"""Numbers that torch or torchtitan would refuse, or misunderstand, only once a run is under way."""

import math
from typing import Any

import torch

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.schema import get, keys_of

MAY_BE_INFINITE = ("training.max_norm",)

LARGEST = torch.finfo(torch.float32).max
WHOLE = range(-(2**63), 2**63)
"""What a whole number of TOML, and a counter of torch, can be."""
SEED = range(-(2**63), 2**64)
LONGEST_WAIT = 10**9
"""Seconds; ten times as much, in nanoseconds, is beyond 64 bits."""


def number_problems(config: FluxJobConfig, training: bool) -> list[str]:
    """Numbers that cannot be computed with; those that only training reads, where it trains."""
    found = _beyond(config)
    return [*found, *_schedule(config), *_profiler(config.profiling)] if training else found


def _beyond(config: FluxJobConfig) -> list[str]:
    found = []
    for key in keys_of(type(config)):
        value = get(config, key.name)
        if isinstance(value, float) and abs(value) > LARGEST and key.name not in MAY_BE_INFINITE:
            what = "not finite" if math.isinf(value) else "beyond float32"
            found.append(f"{key.name} = {value} is {what}")
        elif type(value) is int and value not in (SEED if key.name == "debug.seed" else WHOLE):
            found.append(f"{key.name} = {value} is beyond 64 bits")
    for name in ("comm.init_timeout_seconds", "comm.train_timeout_seconds"):
        if LONGEST_WAIT < get(config, name) < WHOLE.stop:
            found.append(f"{name} = {get(config, name)} must be at most {LONGEST_WAIT}")
    return found


def _schedule(config: FluxJobConfig) -> list[str]:
    """torchtitan's schedule falls below zero after its last step, or is not defined there."""
    steps, total = config.training.steps, config.lr_scheduler.total_steps
    if total is None or steps <= total:
        return []
    return [
        f"training.steps = {steps} is beyond the schedule of the learning rate, "
        f"lr_scheduler.total_steps = {total}; raise that, or remove it to take training.steps"
    ]


def _profiler(profiling: Any) -> list[str]:
    if not profiling.enable_profiling:
        return []
    found = [
        f"profiling.{name} = {getattr(profiling, name)} must be at least {least}"
        for name, least in (("profiler_active", 1), ("profiler_warmup", 0), ("profile_freq", 1))
        if getattr(profiling, name) < least
    ]
    period = profiling.profiler_warmup + profiling.profiler_active
    if not found and profiling.profile_freq < period:
        found.append(
            f"profiling.profile_freq = {profiling.profile_freq} must be at least profiler_warmup + "
            f"profiler_active = {period}"
        )
    return found
