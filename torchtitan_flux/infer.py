"""Prompts -> pictures, with the newest checkpoint of a run or with any weights.

./run_infer.sh --prompt "a handwritten seven" --out seven.png
"""

import argparse
import secrets
import sys
from dataclasses import replace
from datetime import timedelta

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.distributed.utils import set_pg_timeouts
from torchtitan.tools.logging import init_logger, logger

from torchtitan_flux.formatting import format_bytes
from torchtitan_flux.inference.captions import cut_captions
from torchtitan_flux.inference.draw import NotFinite, render
from torchtitan_flux.inference.open_run import InferenceContext, open_run
from torchtitan_flux.inference.options import FRESH_SEED, parse
from torchtitan_flux.inference.targets import check_format, check_paths
from torchtitan_flux.inference.task import Task, task_of
from torchtitan_flux.startup.load_config import exit_on_config_error, load_config
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
        config = load_config(rest, training=False)
        args = resolve_model_args(config, options.weights, training=False)
    task = None
    try:
        task = task_of(options, config, args)
        check_paths(task.paths, task.overwrite)
        for path, request in zip(task.paths, task.requests, strict=False):
            facts = {"prompt": request.prompt, "negative": task.negative, "more": " " * 4096}
            check_format(path, task.settings.size, facts)
        device = start_process_group(config)
        if options.seed == FRESH_SEED:
            task = _with_fresh_seed(task)
        context = open_run(config, options.weights, options.ema)
        if torch.distributed.get_rank() == 0:
            _warn(options, task, context)
        if torch.distributed.get_world_size() > 1:
            # ranks may be a whole chunk of pictures apart; where one ends, the launcher ends all
            comm = config.comm
            seconds = max(A_DAY, comm.init_timeout_seconds, comm.train_timeout_seconds)
            set_pg_timeouts(timedelta(seconds=seconds), context.dims)
        with exit_when_out_of_memory(lambda: remedies(options, task)):
            render(context, task, options.low_memory)
    except (ValueError, FileNotFoundError) as error:
        print(f"Cannot draw: {error}", file=sys.stderr)
        sys.exit(2)
    except NotFinite as error:
        dtype, cfg = config.training.mixed_precision_param, task.settings.cfg if task else 1
        help = ["other weights"]
        if dtype != "float32":
            help.append(f"--training.mixed_precision_param float32 (now {dtype})")
        if cfg != 1:
            help.append(f"a smaller --cfg (now {cfg:g})")
        print(f"Drawing failed: {error}. What may help: {', '.join(help)}", file=sys.stderr)
        sys.exit(1)
    if device.type == "cuda":
        logger.info(f"Peak memory: {format_bytes(torch.cuda.max_memory_allocated(device))}")
    torch.distributed.destroy_process_group()


def remedies(options: argparse.Namespace, task: Task) -> list[str]:
    """Options that make a drawing smaller."""
    found = [] if options.low_memory else ["--low_memory"]
    if task.batch > 1:
        found.append(f"a smaller --inference.local_batch_size (now {task.batch})")
    return [*found, f"a smaller --size (now {task.settings.size})"]


def _with_fresh_seed(task: Task) -> Task:
    """With a seed drawn by rank 0."""
    box = [secrets.randbelow(2**32)]
    torch.distributed.broadcast_object_list(box, src=0)
    if torch.distributed.get_rank() == 0:
        logger.info(f"--seed {box[0]} was drawn, and draws the same again")
    return replace(task, settings=replace(task.settings, seed=box[0]))


def _warn(options: argparse.Namespace, task: Task, context: InferenceContext) -> None:
    """What will not be as it was asked for, in the log."""
    if options.recorded is not None:
        for line in options.recorded.differences(task.picture(task.requests[0], context.names)):
            logger.warning(f"Not the same picture: {line}")
    captions = [request.prompt for request in task.requests]
    if task.settings.cfg != 1.0:
        captions.append(task.negative)
    for line in cut_captions(captions, build_tokenizer(context.config)):
        logger.warning(line)


if __name__ == "__main__":
    main()
