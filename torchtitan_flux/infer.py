"""Prompts -> pictures, with the newest checkpoint of a run or with any weights.

./run_infer.sh --prompt "a handwritten seven" --out seven.png
./run_infer.sh --prompts prompts.txt --steps 28 --cfg 2 --seed 3 --sampling.schedule schnell
./run_infer.sh --prompt "a handwritten seven" --count 4 --seed -1 --out sevens.jpg
./run_infer.sh --from-png seven.png --out again.png
CONFIG_FILE=train_configs/flux_dev_model.toml ./run_infer.sh --weights assets/hf/FLUX.1-dev \\
    --prompt "a red fox"
"""

import argparse
import os
import secrets
import sys
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.distributed.utils import set_pg_timeouts
from torchtitan.tools.logging import init_logger, logger

from torchtitan_flux.inference.captions import cut_captions
from torchtitan_flux.inference.command import FRESH_SEED, Task, changed, parse, task_of
from torchtitan_flux.inference.draw import NotFinite
from torchtitan_flux.inference.estimate import refusal, remedies
from torchtitan_flux.inference.expectation import Expectation
from torchtitan_flux.inference.memory import PeakMemory, free_memory
from torchtitan_flux.inference.open_run import begin
from torchtitan_flux.inference.recording import check_sources
from torchtitan_flux.inference.render import render
from torchtitan_flux.inference.targets import check_free, check_room, check_writable
from torchtitan_flux.planning.command import model_args
from torchtitan_flux.startup.load_config import exit_on_config_error, load_config, read_config
from torchtitan_flux.startup.model_args import resolve_model_args
from torchtitan_flux.training.conditioning import build_tokenizer
from torchtitan_flux.training.console import quieten_libraries
from torchtitan_flux.training.out_of_memory import exit_when_out_of_memory
from torchtitan_flux.training.process import start_process_group

A_DAY = 24 * 3600
"""Seconds."""


@record
def main() -> None:
    """Entry point of every rank."""
    init_logger()
    quieten_libraries()
    with exit_on_config_error():
        options, rest = parse(sys.argv[1:])
        if options.memory is None:
            config = load_config(rest, training=False)
            args = resolve_model_args(config, options.weights, training=False)
        else:  # another machine's, whose files need not be here
            config = read_config(rest)
            args = model_args(config, options.weights, training=False)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        task = task_of(options, config, args, ranks)
        if options.memory is None:
            check_sources(options, config)
        expected = Expectation.of(config, args, task, ranks, elsewhere=options.memory is not None)
        if options.memory is not None:
            _say(expected.told(int(options.memory * 2**30), "as given by --memory"))
            return
        if not options.estimate:
            _check_targets(task)
        device = start_process_group(config)
        if options.estimate:
            _say(expected.told(free_memory(device), f"on {device}"))
        else:
            _draw(options, config, _seeded(task, options), expected, device)
    except (ValueError, FileNotFoundError) as error:
        print(f"Cannot draw: {error}", file=sys.stderr)
        sys.exit(2)
    except NotFinite as error:
        print(f"Drawing failed: {error}. {_of_not_finite(task, config)}", file=sys.stderr)
        sys.exit(1)
    torch.distributed.destroy_process_group()


def _draw(
    options: argparse.Namespace,
    config: Any,
    task: Task,
    expected: Expectation,
    device: torch.device,
) -> None:
    """Draw if it fits, and say what it took.

    Raises:
        ValueError, FileNotFoundError: why it cannot be done.
    """
    low = options.low_memory
    wanted, lower = (expected.low, None) if low else (expected.normal, expected.low)
    if reason := refusal(wanted, lower, free_memory(device), expected.batch, task.settings):
        raise ValueError(reason)
    first = torch.distributed.get_rank() == 0
    if first:
        _say_before(options, config, task)
    with (
        exit_when_out_of_memory(lambda: remedies(lower, None, expected.batch, task.settings)),
        PeakMemory(device) as memory,
    ):
        begun = begin(config, options.weights)
        if torch.distributed.get_world_size() > 1:
            set_pg_timeouts(_patience(config), begun.dims)
        render(begun, task, low)
        peak = memory.peak
    if first:
        logger.info(expected.took(peak, memory.before, low))


def _check_targets(task: Task) -> None:
    """Raises ValueError where a picture cannot be kept as --out says."""
    check_free(task.paths, task.overwrite)
    check_writable(task.paths)
    for path, request in zip(task.paths, task.requests, strict=False):
        said = {"prompt": request.prompt, "negative": task.negative, "more": " " * 4096}
        check_room(path, task.settings.size, said)


def _seeded(task: Task, options: argparse.Namespace) -> Task:
    """With a seed where a fresh one is asked for, the same on every rank."""
    if options.seed != FRESH_SEED:
        return task
    box = [secrets.randbelow(2**32)]
    torch.distributed.broadcast_object_list(box, src=0)
    if torch.distributed.get_rank() == 0:
        logger.info(f"--seed {box[0]} was drawn, and draws the same again")
    return replace(task, settings=replace(task.settings, seed=box[0]))


def _say_before(options: argparse.Namespace, config: Any, task: Task) -> None:
    """What will not be as it was asked for, in the log."""
    for name in options.trusted:
        logger.info(f"{options.from_png} names, and --trust opens: {name}")
    for line in changed(options, task):
        logger.warning(f"Not the same picture: {line}")
    captions = [request.prompt for request in task.requests]
    if task.settings.cfg != 1.0:
        captions.append(task.negative)
    for line in cut_captions(captions, build_tokenizer(config)):
        logger.warning(line)


def _of_not_finite(task: Task, config: Any) -> str:
    """What may help."""
    dtype, cfg = config.training.mixed_precision_param, task.settings.cfg
    found = ["other weights"]
    if dtype != "float32":
        found.append(f"--training.mixed_precision_param float32 (now {dtype})")
    if cfg != 1.0:
        found.append(f"a smaller --cfg (now {cfg:g})")
    return f"What may help: {', '.join(found)}"


def _patience(config: Any) -> timedelta:
    """How long ranks wait for each other: they may be a whole portion of pictures apart.

    The launcher ends them all where one ends, so that waiting costs nothing.
    """
    comm = config.comm
    return timedelta(seconds=max(A_DAY, comm.init_timeout_seconds, comm.train_timeout_seconds))


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text)


if __name__ == "__main__":
    main()
