"""From a task to picture files, on all ranks; each picture is written as soon as it is there."""

import sys
from dataclasses import replace

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torchtitan.tools.logging import logger
from tqdm import tqdm

from torchtitan_flux.image_file import save_picture
from torchtitan_flux.inference.command import Task
from torchtitan_flux.inference.draw import assign, batches_of, draw, gathered, rounds_of
from torchtitan_flux.inference.open_run import InferenceContext, load_model
from torchtitan_flux.inference.picture_settings import PictureSettings, names_of
from torchtitan_flux.inference.stages import Loaded, OneAfterAnother, Stages
from torchtitan_flux.inference.targets import unwritable
from torchtitan_flux.sampling.generate import to_pil
from torchtitan_flux.training.conditioning import build_tokenizer


def render(context: InferenceContext, task: Task, low_memory: bool) -> None:
    """Draw and write.

    Args:
        context: with what.
        task: what.
        low_memory: one part after another, blocks from CPU memory.

    Raises:
        ValueError: a picture cannot be written.
        NotFinite: a picture cannot be drawn; those before it are written.
    """
    dims, first = context.dims, torch.distributed.get_rank() == 0
    where = assign(len(task.requests), dims.data_degree, task.batch)
    by_round = rounds_of(where)
    names = names_of(context.config, context.checkpoint, context.weights is None)
    if context.average is not None:
        names["ema"] = context.average
    with tqdm(
        total=len(where) * task.settings.steps,
        unit="step",
        disable=not (first and sys.stderr.isatty()),
        dynamic_ncols=True,
    ) as bar:
        images = draw(
            _stages(context, low_memory),
            context.args.geometry,
            task.requests,
            batches_of(dims.data_rank, where),
            task.settings,
            task.negative,
            on_step=lambda number: bar.update(len(by_round[number])),
        )
        for numbers, batch in zip(by_round, images, strict=True):
            every = gathered(batch, dims.data_group, context.device)
            for number in numbers if first else ():
                request, place = task.requests[number], where[number]
                settings = replace(task.settings, seed=task.settings.seed + request.again)
                drawn = PictureSettings(
                    request.prompt, task.negative, settings, request.index, names
                )
                path = task.paths[number]
                try:
                    save_picture(to_pil(every[place.rank][place.row]), path, drawn.facts())
                except OSError as error:
                    raise unwritable(path, error) from None
                bar.clear()
                logger.info(f"{request.prompt!r}, seed {settings.seed} -> {path}")


def _stages(context: InferenceContext, low_memory: bool) -> Stages:
    if not low_memory:
        session = load_model(context)
        return Loaded(session.model, session.encoders)
    return OneAfterAnother(
        context.config,
        context.args,
        context.open_weights(),
        build_tokenizer(context.config),
        context.device,
        context.dtype,
    )
