"""Prompts -> pictures, with the newest checkpoint of a run or with any weights.

./run_infer.sh --prompt "a handwritten seven" --out seven.png
./run_infer.sh --prompts prompts.txt --steps 28 --cfg 2 --seed 3 --sampling.schedule schnell
./run_infer.sh --prompt "a handwritten seven" --count 4 --seed -1 --out sevens.jpg
./run_infer.sh --from-png seven.png --out again.png
CONFIG_FILE=train_configs/flux_dev_model.toml ./run_infer.sh --weights assets/hf/FLUX.1-dev \\
    --prompt "a red fox"
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

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.formatting import format_bytes
from torchtitan_flux.inference.captions import cut_captions
from torchtitan_flux.inference.command import FRESH_SEED, Task, changed, parse, task_of
from torchtitan_flux.inference.draw import NotFinite
from torchtitan_flux.inference.open_run import InferenceContext, open_run
from torchtitan_flux.inference.picture_settings import names_of
from torchtitan_flux.inference.render import render
from torchtitan_flux.inference.targets import check_free, check_room, check_writable
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
    try:
        task = task_of(options, config, args)
        _check_targets(task)
        device = start_process_group(config)
        task = _seeded(task, options)
        context = open_run(config, options.weights, options.ema)
        if torch.distributed.get_rank() == 0:
            _say_before(options, config, task, context)
        if torch.distributed.get_world_size() > 1:
            set_pg_timeouts(_patience(config), context.dims)
        with exit_when_out_of_memory(lambda: remedies(options, task)):
            render(context, task, options.low_memory)
    except (ValueError, FileNotFoundError) as error:
        print(f"Cannot draw: {error}", file=sys.stderr)
        sys.exit(2)
    except NotFinite as error:
        print(f"Drawing failed: {error}. {_of_not_finite(task, config)}", file=sys.stderr)
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


def _say_before(
    options: argparse.Namespace, config: FluxJobConfig, task: Task, context: InferenceContext
) -> None:
    """What will not be as it was asked for, in the log."""
    lines = changed(options, task)
    if options.recorded is not None:
        names = names_of(config, context.checkpoint, context.weights is None)
        lines += options.recorded.differences(names)
    for line in lines:
        logger.warning(f"Not the same picture: {line}")
    captions = [request.prompt for request in task.requests]
    if task.settings.cfg != 1.0:
        captions.append(task.negative)
    for line in cut_captions(captions, build_tokenizer(config)):
        logger.warning(line)


def _of_not_finite(task: Task, config: FluxJobConfig) -> str:
    """What may help."""
    dtype, cfg = config.training.mixed_precision_param, task.settings.cfg
    found = ["other weights"]
    if dtype != "float32":
        found.append(f"--training.mixed_precision_param float32 (now {dtype})")
    if cfg != 1.0:
        found.append(f"a smaller --cfg (now {cfg:g})")
    return f"What may help: {', '.join(found)}"


def _patience(config: FluxJobConfig) -> timedelta:
    """How long ranks wait for each other: they may be a whole chunk of pictures apart.

    The launcher ends them all where one ends, so that waiting costs nothing.
    """
    comm = config.comm
    return timedelta(seconds=max(A_DAY, comm.init_timeout_seconds, comm.train_timeout_seconds))


if __name__ == "__main__":
    main()
