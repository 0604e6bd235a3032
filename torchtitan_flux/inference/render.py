"""From a task to picture files, on all ranks; each picture is written as soon as it is there."""

import sys

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torchtitan.tools.logging import logger
from tqdm import tqdm

from torchtitan_flux.image_file import save_picture
from torchtitan_flux.inference import stages
from torchtitan_flux.inference.draw import draw
from torchtitan_flux.inference.open_run import InferenceContext, load_model
from torchtitan_flux.inference.targets import unwritable
from torchtitan_flux.inference.task import Task
from torchtitan_flux.parallel.replicated_rows import Peers
from torchtitan_flux.sampling.generate import to_pil
from torchtitan_flux.training.conditioning import build_tokenizer


def render(context: InferenceContext, task: Task, low_memory: bool) -> None:
    """Draw and write.

    Args:
        context: what is drawn with.
        task: what is drawn.
        low_memory: one part after another, blocks from CPU memory.

    Raises:
        ValueError: a picture cannot be written.
        NotFinite: a picture cannot be drawn; those before it are written.
    """
    ranks, first = Peers(context.dims.data_group), torch.distributed.get_rank() == 0
    rounds = torch.arange(len(task.requests)).split(task.batch * context.dims.data_degree)
    batches = [[task.requests[i] for i in ranks.own(one).tolist()] for one in rounds]
    if low_memory:
        weights, tokenizer = context.open_weights(), build_tokenizer(context.config)
        loaded = stages.low_memory(
            context.config, context.args, weights, tokenizer, context.device, context.dtype
        )
    else:
        loaded = stages.all_loaded(*load_model(context))
    with tqdm(
        total=sum(map(len, batches)) * task.settings.steps,
        unit="step",
        disable=not (first and sys.stderr.isatty()),
        dynamic_ncols=True,
    ) as bar:
        images = draw(
            loaded, context.args.geometry, batches, task.settings, task.negative, bar.update
        )
        for numbers, batch in zip(rounds, images, strict=True):
            together = ranks.join(batch.to(context.device), len(numbers)).cpu()
            for i, image in zip(numbers.tolist(), together, strict=True) if first else ():
                path, drawn = task.paths[i], task.picture(task.requests[i], context.names)
                try:
                    save_picture(to_pil(image), path, drawn.facts())
                except OSError as error:
                    raise unwritable(path, error) from None
                bar.clear()
                logger.info(f"{drawn.prompt!r}, seed {drawn.settings.seed} -> {path}")
