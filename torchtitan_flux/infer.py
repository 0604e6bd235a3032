"""Prompts -> pictures, with the newest checkpoint of a run or with any weights.

./run_infer.sh --prompt "a handwritten seven" --out seven.png
"""

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.distributed.utils import set_pg_timeouts
from torchtitan.tools.logging import init_logger, logger

from torchtitan_flux.formatting import format_bytes
from torchtitan_flux.inference.draw import NotFinite, render
from torchtitan_flux.inference.open_run import InferenceContext, open_run
from torchtitan_flux.inference.options import parse
from torchtitan_flux.inference.picture import Picture, check_paths, requested, targets
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
    batch_size = config.inference.local_batch_size
    try:
        pictures = requested(options, config, args)
        folder = Path(config.job.dump_folder, config.inference.save_img_folder)
        paths = targets(options, folder, pictures)
        check_paths(paths, options.overwrite)
        device = start_process_group(config)
        context = open_run(config, options.weights, options.ema)
        if torch.distributed.get_rank() == 0:
            _warn(options.recorded, pictures, context)
        if torch.distributed.get_world_size() > 1:
            # ranks may be a whole chunk of pictures apart; where one ends, the launcher ends all
            comm = config.comm
            seconds = max(A_DAY, comm.init_timeout_seconds, comm.train_timeout_seconds)
            set_pg_timeouts(timedelta(seconds=seconds), context.dims)
        remedies = [
            "--low_memory",
            f"a smaller --inference.local_batch_size (now {batch_size})",
            f"a smaller --size (now {pictures[0].settings.size})",
        ]
        with exit_when_out_of_memory(lambda: remedies):
            render(context, pictures, paths, batch_size, options.low_memory)
    except (ValueError, FileNotFoundError) as error:
        print(f"Cannot draw: {error}", file=sys.stderr)
        sys.exit(2)
    except NotFinite as error:
        help = "other weights, --training.mixed_precision_param float32, a smaller --cfg"
        print(f"Drawing failed: {error}. What may help: {help}", file=sys.stderr)
        sys.exit(1)
    if device.type == "cuda":
        logger.info(f"Peak memory: {format_bytes(torch.cuda.max_memory_allocated(device))}")
    torch.distributed.destroy_process_group()


def _warn(recorded: Picture | None, pictures: list[Picture], context: InferenceContext) -> None:
    """What will not be as it was asked for, in the log."""
    first = replace(pictures[0], names=context.names)
    for line in recorded.differences(first) if recorded else ():
        logger.warning(f"Not the same picture: {line}")
    tokenizer = build_tokenizer(context.config)
    for caption in dict.fromkeys([*(one.prompt for one in pictures), first.negative_prompt]):
        for encoder, (tokens, limit) in tokenizer.cut(caption).items():
            logger.warning(
                f"{caption!r} is cut for {encoder}: it has {tokens} tokens, {limit} are read"
            )


if __name__ == "__main__":
    main()
