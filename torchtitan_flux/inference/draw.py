"""Pictures in rounds: all ranks draw a batch each, and the pictures of a round are there at once.

Captions are encoded and latents decoded one at a time, so that a picture depends on nothing but its
own request and the shape of the batch that the transformer saw.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from jaxtyping import Float
from torch import Tensor
from torchtitan.tools.logging import logger
from tqdm import tqdm

from torchtitan_flux.collectives import all_gather_rows, shard_rows
from torchtitan_flux.image_file import save_picture
from torchtitan_flux.inference.open_run import InferenceContext, load_model
from torchtitan_flux.inference.picture import Picture
from torchtitan_flux.inference.stages import Stages, all_loaded, low_memory_stages
from torchtitan_flux.inference.targets import unwritable
from torchtitan_flux.latents import Geometry
from torchtitan_flux.model.inputs import TextConditioning
from torchtitan_flux.sampling.euler import all_finite
from torchtitan_flux.sampling.generate import denoise, displayable, initial_noise, to_pil
from torchtitan_flux.training.conditioning import build_tokenizer

Batches = Sequence[Sequence[Picture]]
MAX_IMAGES_PER_CHUNK = 32
"""Pictures of a rank that go together through sequential stages, so that memory does not grow with
their number and the first are written before the last are started."""


class NotFinite(RuntimeError):
    """A picture has values that are infinite or no number; says which one, and at which step."""


def render(
    context: InferenceContext,
    pictures: Sequence[Picture],
    paths: Sequence[Path],
    batch_size: int,
    low_memory: bool,
) -> None:
    """Draw and write, on all ranks; each picture is written as soon as it is there.

    Raises:
        ValueError: a picture cannot be written.
        NotFinite: a picture cannot be drawn; those before it are written.
    """
    group, first = context.dims.data_group, torch.distributed.get_rank() == 0
    rounds = torch.arange(len(pictures)).split(batch_size * context.dims.data_degree)
    batches = [[pictures[i] for i in shard_rows(one, group).tolist()] for one in rounds]
    if low_memory:
        weights, tokenizer = context.open_weights(), build_tokenizer(context.config)
        stages = low_memory_stages(
            context.config, context.args, weights, tokenizer, context.device, context.dtype
        )
    else:
        stages = all_loaded(*load_model(context))
    with tqdm(
        total=sum(map(len, batches)) * pictures[0].settings.steps,
        unit="step",
        disable=not (first and sys.stderr.isatty()),
        dynamic_ncols=True,
    ) as bar:
        images = draw(stages, context.args.geometry, batches, bar.update)
        for numbers, batch in zip(rounds, images, strict=True):
            together = all_gather_rows(batch.to(context.device), len(numbers), group).cpu()
            for i, image in zip(numbers.tolist(), together, strict=True) if first else ():
                drawn = replace(pictures[i], names=context.names)
                try:
                    save_picture(to_pil(image), paths[i], drawn.facts())
                except OSError as error:
                    raise unwritable(paths[i], error) from None
                bar.clear()
                logger.info(f"{drawn.prompt!r}, seed {drawn.settings.seed} -> {paths[i]}")


def draw(
    stages: Stages,
    geometry: Geometry,
    batches: Batches,
    on_step: Callable[[int], object] = lambda count: None,
) -> Iterator[Float[Tensor, "b c H W"]]:
    """This rank's images of each batch, in [-1, 1], float32, on the CPU.

    Args:
        stages: text encoders, transformer and codec; of ranks that share them, all have to call.
        batches: pictures whose settings differ in nothing but the seed.
        on_step: called after each step of a batch, with the number of its pictures.

    Raises:
        NotFinite: at the step at which that is seen.
    """
    chunk = max(1, MAX_IMAGES_PER_CHUNK // len(batches[0])) if stages.sequential else len(batches)
    # a sequential stage ends before the next one begins; others pass each batch on as it comes
    collect = list if stages.sequential else iter
    for begin in range(0, len(batches), chunk):
        some = batches[begin : begin + chunk]
        texts = collect(_texts(stages, some))
        latents = collect(_latents(stages, geometry, some, texts, on_step))
        yield from _images(stages, some, latents)


def _texts(
    stages: Stages, batches: Batches
) -> Iterator[tuple[TextConditioning, TextConditioning | None]]:
    """Conditioning of each batch and of the negative prompt, on the CPU."""
    with stages.text() as encode:

        def encoded(caption: str) -> TextConditioning:
            text = encode([caption]).to("cpu")
            for name, part in (("T5", text.txt), ("CLIP", text.vec)):
                if not all_finite(part).all():
                    raise NotFinite(
                        f"{caption!r} is not finite as {name} encodes it, before the first step"
                    )
            return text

        # ranks that share an encoder work in step, so that none may leave a caption out
        once = cache(encoded) if stages.sequential else encoded
        first = batches[0][0]
        negative = once(first.negative_prompt) if first.settings.cfg != 1.0 else None
        for batch in batches:
            texts = [once(picture.prompt) for picture in batch]
            txt, vec = torch.cat([one.txt for one in texts]), torch.cat([one.vec for one in texts])
            yield TextConditioning(txt, vec), negative


def _latents(
    stages: Stages,
    geometry: Geometry,
    batches: Batches,
    texts: Iterable[tuple[TextConditioning, TextConditioning | None]],
    on_step: Callable[[int], object],
) -> Iterator[Float[Tensor, "b c h w"]]:
    """Latents of each batch, on the CPU."""
    device, settings = stages.device, batches[0][0].settings
    with stages.transformer() as model:
        for batch, (text, negative) in zip(batches, texts, strict=True):
            steps = itertools.count(1)

            def check(x: Tensor, batch=batch, steps=steps) -> None:
                step, finite = next(steps), all_finite(x).tolist()
                if not all(finite):  # one wait for the device in each step, small beside the step
                    prompt = batch[finite.index(False)].prompt
                    raise NotFinite(f"{prompt!r} is not finite at step {step} of {settings.steps}")
                on_step(len(batch))

            noise = [
                initial_noise(geometry, settings.size, one.settings.seed, one.index)
                for one in batch
            ]
            yield denoise(
                model,
                geometry,
                torch.stack(noise).to(device),
                text.to(device),
                negative and negative.to(device),
                settings,
                check,
            ).cpu()


@torch.no_grad()
def _images(
    stages: Stages,
    batches: Batches,
    latents: Iterable[Float[Tensor, "b c h w"]],
) -> Iterator[Float[Tensor, "b c H W"]]:
    """Decoded pictures of each batch, on the CPU."""
    with stages.codec() as codec:
        for batch, some in zip(batches, latents, strict=True):
            images = [
                displayable(codec.decode(one.to(stages.device))).cpu() for one in some.split(1)
            ]
            for picture, image in zip(batch, images, strict=True):
                if image.isnan().any():
                    raise NotFinite(
                        f"{picture.prompt!r} is not finite once decoded, after the last step"
                    )
            yield torch.cat(images)
