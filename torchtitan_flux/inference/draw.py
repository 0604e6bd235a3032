"""Pictures in rounds: all ranks draw a batch each, and the pictures of a round are there at once.

Captions are encoded and latents decoded one at a time, so that a picture depends on nothing but its
own request and the shape of the batch that the transformer saw.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from torchtitan_flux.inference.stages import Stages
from torchtitan_flux.latents import Geometry
from torchtitan_flux.model.inputs import TextConditioning
from torchtitan_flux.sampling.euler import all_finite
from torchtitan_flux.sampling.generate import SampleSettings, denoise, displayable, initial_noise

MAX_IMAGES_PER_CHUNK = 32
"""Pictures of a rank that go together through sequential stages, so that memory does not grow with
their number and the first are written before the last are started."""


class NotFinite(RuntimeError):
    """A picture has values that are infinite or no number; says which one, and at which step."""


@dataclass(frozen=True)
class Request:
    """A picture to draw; its noise is a function of (settings.seed + repeat, index).

    Attributes:
        prompt: its caption.
        index: number of the caption.
        repeat: how many pictures of the same caption come before it.
    """

    prompt: str
    index: int
    repeat: int = 0


def draw(
    stages: Stages,
    geometry: Geometry,
    batches: Sequence[Sequence[Request]],
    settings: SampleSettings,
    negative_prompt: str = "",
    on_step: Callable[[int], object] = lambda count: None,
) -> Iterator[Float[Tensor, "b c H W"]]:
    """This rank's images of each batch, in [-1, 1], float32, on the CPU.

    Args:
        stages: text encoders, transformer and codec; of ranks that share them, all have to call.
        geometry: of the flavor.
        batches: what is asked for.
        settings: size, steps, guidance, seed.
        negative_prompt: what classifier-free guidance moves away from.
        on_step: called after each step of a batch, with the number of its pictures.

    Raises:
        NotFinite: at the step at which that is seen.
    """
    chunk = max(1, MAX_IMAGES_PER_CHUNK // len(batches[0])) if stages.sequential else len(batches)
    # a sequential stage ends before the next one begins; others pass each batch on as it comes
    collect = list if stages.sequential else iter
    for begin in range(0, len(batches), chunk):
        some = batches[begin : begin + chunk]
        texts = collect(_texts(stages, some, negative_prompt if settings.cfg != 1.0 else None))
        latents = collect(_latents(stages, geometry, some, texts, settings, on_step))
        yield from _images(stages, some, latents)


def _texts(
    stages: Stages, batches: Sequence[Sequence[Request]], negative_prompt: str | None
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
        negative = None if negative_prompt is None else once(negative_prompt)
        for batch in batches:
            texts = [once(request.prompt) for request in batch]
            txt, vec = torch.cat([one.txt for one in texts]), torch.cat([one.vec for one in texts])
            yield TextConditioning(txt, vec), negative


def _latents(
    stages: Stages,
    geometry: Geometry,
    batches: Sequence[Sequence[Request]],
    texts: Iterable[tuple[TextConditioning, TextConditioning | None]],
    settings: SampleSettings,
    on_step: Callable[[int], object],
) -> Iterator[Float[Tensor, "b c h w"]]:
    """Latents of each batch, on the CPU."""
    device, size = stages.device, settings.size
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
                initial_noise(geometry, size, settings.seed + one.repeat, one.index)
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
    batches: Sequence[Sequence[Request]],
    latents: Iterable[Float[Tensor, "b c h w"]],
) -> Iterator[Float[Tensor, "b c H W"]]:
    """Decoded pictures of each batch, on the CPU."""
    with stages.codec() as codec:
        for batch, some in zip(batches, latents, strict=True):
            images = [
                displayable(codec.decode(one.to(stages.device))).cpu() for one in some.split(1)
            ]
            for request, image in zip(batch, images, strict=True):
                if image.isnan().any():
                    raise NotFinite(
                        f"{request.prompt!r} is not finite once decoded, after the last step"
                    )
            yield torch.cat(images)
