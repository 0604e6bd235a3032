"""From a task to picture files, on all ranks; each picture is written as soon as it is there."""

import sys

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torchtitan.tools.logging import logger
from tqdm import tqdm

from torchtitan_flux.image_file import save_picture
from torchtitan_flux.inference.command import Task
from torchtitan_flux.inference.draw import batches_of, draw, gathered, places, rounds_of
from torchtitan_flux.inference.open_run import Beginning, load
from torchtitan_flux.inference.recording import Recorder
from torchtitan_flux.inference.stages import Loaded, OneAfterAnother, Stages
from torchtitan_flux.inference.targets import unwritable
from torchtitan_flux.sampling.generate import to_pil
from torchtitan_flux.training.conditioning import build_tokenizer


def render(begun: Beginning, task: Task, low_memory: bool) -> None:
    """Draw and write.

    Args:
        begun: with what.
        task: what.
        low_memory: one part after another, blocks streamed.

    Raises:
        ValueError: a picture cannot be written.
        NotFinite: a picture cannot be drawn; those before it are written.
    """
    dims, first = begun.dims, torch.distributed.get_rank() == 0
    where = places(len(task.requests), dims.data_degree, task.batch)
    by_round = rounds_of(where)
    recorder = Recorder(begun, task) if first else None
    with tqdm(
        total=len(where) * task.settings.steps,
        unit="step",
        disable=not (first and sys.stderr.isatty()),
        dynamic_ncols=True,
    ) as bar:

        def stepped(number: int) -> None:
            bar.update(len(by_round[number]))

        images = draw(
            _stages(begun, low_memory),
            begun.args.geometry,
            task.requests,
            batches_of(dims.data_rank, where),
            task.settings,
            task.negative,
            on_step=stepped,
        )
        for numbers, batch in zip(by_round, images, strict=True):
            every = gathered(batch, dims.data_group, begun.device)
            if recorder is None:
                continue
            for number in numbers:
                if task.kept not in (None, number):
                    continue
                place = where[number]
                path = task.paths[0 if task.kept is not None else number]
                said = recorder.of(number, place)
                try:
                    save_picture(to_pil(every[place.rank][place.row]), path, said.facts())
                except OSError as error:
                    raise unwritable(path, error) from None
                bar.clear()
                logger.info(f"{said.prompt!r}, seed {said.settings.seed} -> {path}")


def _stages(begun: Beginning, low_memory: bool) -> Stages:
    if not low_memory:
        session = load(begun)
        return Loaded(session.model, session.parts)
    return OneAfterAnother(
        begun.config,
        begun.args,
        begun.open_weights(),
        build_tokenizer(begun.config),
        begun.device,
        begun.dtype,
    )
