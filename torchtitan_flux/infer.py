"""Prompts -> pictures, with the newest checkpoint of a run or with any weights.

./run_infer.sh --prompt "a handwritten seven" --out seven.png
"""

import secrets
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.distributed.utils import set_pg_timeouts
from torchtitan.tools.logging import init_logger, logger

from torchtitan_flux.collectives import from_rank_0
from torchtitan_flux.formatting import format_bytes
from torchtitan_flux.inference.draw import NotFinite, render
from torchtitan_flux.inference.open_run import InferenceContext, open_run
from torchtitan_flux.inference.options import FRESH_SEED, parse
from torchtitan_flux.inference.picture import Picture
from torchtitan_flux.inference.requested import cut_captions, requested
from torchtitan_flux.inference.targets import check_paths, targets
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
    batch_size, settings = config.inference.local_batch_size, None
    try:
        pictures = requested(options, config, args)
        folder = Path(config.job.dump_folder, config.inference.save_img_folder)
        paths, settings = targets(options, folder, pictures), pictures[0].settings
        check_paths(paths, options.overwrite)
        device = start_process_group(config)
        if options.seed == FRESH_SEED:
            pictures = _with_fresh_seeds(pictures)
        context = open_run(config, options.weights, options.ema)
        if torch.distributed.get_rank() == 0:
            _warn(options.recorded, pictures, context)
        if torch.distributed.get_world_size() > 1:
            # ranks may be a whole chunk of pictures apart; where one ends, the launcher ends all
            comm = config.comm
            seconds = max(A_DAY, comm.init_timeout_seconds, comm.train_timeout_seconds)
            set_pg_timeouts(timedelta(seconds=seconds), context.dims)
        remedies = [] if options.low_memory else ["--low_memory"]
        if batch_size > 1:
            remedies.append(f"a smaller --inference.local_batch_size (now {batch_size})")
        remedies.append(f"a smaller --size (now {settings.size})")
        with exit_when_out_of_memory(lambda: remedies):
            render(context, pictures, paths, batch_size, options.low_memory)
    except (ValueError, FileNotFoundError) as error:
        print(f"Cannot draw: {error}", file=sys.stderr)
        sys.exit(2)
    except NotFinite as error:
        dtype, cfg = config.training.mixed_precision_param, settings.cfg if settings else 1
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


def _with_fresh_seeds(pictures: list[Picture]) -> list[Picture]:
    """With seeds that count up from one that rank 0 draws."""
    seed = from_rank_0(lambda: secrets.randbelow(2**32))
    if torch.distributed.get_rank() == 0:
        logger.info(f"--seed {seed} was drawn, and draws the same again")
    return [
        replace(one, settings=replace(one.settings, seed=one.settings.seed - FRESH_SEED + seed))
        for one in pictures
    ]


def _warn(recorded: Picture | None, pictures: list[Picture], context: InferenceContext) -> None:
    """What will not be as it was asked for, in the log."""
    first = replace(pictures[0], names=context.names)
    for line in recorded.differences(first) if recorded else ():
        logger.warning(f"Not the same picture: {line}")
    captions = [one.prompt for one in pictures]
    if first.settings.cfg != 1.0:
        captions.append(first.negative_prompt)
    for line in cut_captions(captions, build_tokenizer(context.config)):
        logger.warning(line)


if __name__ == "__main__":
    main()
