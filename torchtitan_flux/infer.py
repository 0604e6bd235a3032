"""Prompts -> pictures, with the newest checkpoint of a run or with any weights.

./run_infer.sh --prompt "a handwritten seven" --out seven.png
./run_infer.sh --prompts prompts.txt --steps 28 --cfg 2 --seed 3 --sampling.schedule schnell
./run_infer.sh --from-png seven.png --out again.png
CONFIG_FILE=train_configs/flux_dev_model.toml ./run_infer.sh --weights assets/hf/FLUX.1-dev \\
    --prompt "a red fox"
"""

import argparse
import os
import sys
from datetime import timedelta
from typing import Any

import torchtitan_flux.engine  # noqa: F401  (before torchtitan)

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.distributed.utils import set_pg_timeouts
from torchtitan.tools.logging import init_logger, logger

from torchtitan_flux.config.manager import exit_on_config_error, load_config, read_config
from torchtitan_flux.config.resolve import resolve_model_args
from torchtitan_flux.inference.command import Task, changed, check_writable, parse, task_of
from torchtitan_flux.inference.estimate import refusal, remedies
from torchtitan_flux.inference.expectation import Expectation
from torchtitan_flux.inference.memory import PeakMemory, free_memory
from torchtitan_flux.inference.recording import check_sources
from torchtitan_flux.inference.render import render
from torchtitan_flux.planning.command import model_args
from torchtitan_flux.training.console import quieten_libraries
from torchtitan_flux.training.out_of_memory import exit_when_out_of_memory
from torchtitan_flux.training.process import start_process_group
from torchtitan_flux.training.session import begin

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
            check_writable(task.paths)
        device = start_process_group(config)
        if options.estimate:
            _say(expected.told(free_memory(device), f"on {device}"))
        else:
            _draw(options, config, task, expected, device)
    except (ValueError, FileNotFoundError) as error:
        print(f"Cannot draw: {error}", file=sys.stderr)
        sys.exit(2)
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
    for line in changed(options, task) if first else ():
        logger.warning(f"Not the same picture: {line}")
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
