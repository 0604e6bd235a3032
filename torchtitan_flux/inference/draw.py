"""Pictures in rounds: all ranks draw a batch each, and the pictures of a round are there at once.

Captions are encoded and latents decoded one at a time, so that a picture depends on nothing but its
own request and the shape of the batch that the transformer saw: that shape, and the picture's place
in it, are recorded, and the same call gives the same bits.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from torchtitan_flux.encoders.codec import Codec
from torchtitan_flux.inference.stages import Stages
from torchtitan_flux.latents import Geometry
from torchtitan_flux.model.inputs import TextConditioning
from torchtitan_flux.sampling.euler import all_finite
from torchtitan_flux.sampling.generate import (
    SampleSettings,
    TextEncoding,
    denoise,
    displayable,
    initial_noise,
)

MAX_IMAGES_PER_CHUNK = 32
"""Pictures of a rank that go together from part to part, where parts take turns: so that memory
does not grow with their number, and the first are there before the last are begun."""


class NotFinite(RuntimeError):
    """A picture has values that are infinite or no number; says which one, and at which step."""


@dataclass(frozen=True)
class Request:
    """A picture to draw; its noise is a function of (settings.seed + again, index).

    Attributes:
        prompt: its caption.
        index: number of the caption.
        again: how many pictures of the same caption come before it.
    """

    prompt: str
    index: int
    again: int = 0


@dataclass(frozen=True)
class Place:
    """Where a picture is drawn: which round, and which row of which rank's batch of `batch`."""

    round: int
    rank: int
    row: int
    batch: int


def assign(count: int, ranks: int, batch_size: int) -> list[Place]:
    """Where each of so many pictures is drawn, in their order.

    In each round every rank draws equally many, for ranks that share a model work in step; what is
    left over in the last one is filled with repeats.
    """
    found: list[Place] = []
    rounds = 0
    while len(found) < count:
        left = count - len(found)
        size = min(batch_size, -(-left // ranks))
        found += [Place(rounds, i // size, i % size, size) for i in range(min(left, size * ranks))]
        rounds += 1
    return found


def rounds_of(where: Sequence[Place]) -> list[list[int]]:
    """The pictures of each round, by their numbers."""
    return [list(numbers) for _, numbers in groupby(range(len(where)), lambda i: where[i].round)]


def batches_of(rank: int, where: Sequence[Place]) -> list[list[int]]:
    """The pictures that a rank draws in each round, by their numbers."""
    rounds: list[list[int]] = []
    for numbers in rounds_of(where):
        batch = where[numbers[0]].batch
        mine = range(rank * batch, (rank + 1) * batch)
        rounds.append([numbers[min(i, len(numbers) - 1)] for i in mine])
    return rounds


def rounds_per_chunk(batch: int) -> int:
    """Rounds that go together from part to part, at least one."""
    return max(1, MAX_IMAGES_PER_CHUNK // batch)


def draw(
    stages: Stages,
    geometry: Geometry,
    requests: Sequence[Request],
    rounds: Sequence[Sequence[int]],
    settings: SampleSettings,
    negative_prompt: str = "",
    on_step: Callable[[int], object] = lambda round: None,
) -> Iterator[Float[Tensor, "b c H W"]]:
    """This rank's images of each round, in [-1, 1], float32, on the CPU.

    Args:
        stages: text encoders, transformer and codec; of ranks that share them, all have to call.
        geometry: of the flavor.
        requests: what is asked for.
        rounds: from `batches_of`.
        settings: size, steps, guidance, seed.
        negative_prompt: what classifier-free guidance moves away from.
        on_step: called after each step of a round, with its number.

    Raises:
        NotFinite: at the step at which that is seen.
    """
    if stages.apart and len(rounds) > (size := rounds_per_chunk(len(rounds[0]))):
        for begin in range(0, len(rounds), size):

            def stepped(number: int, begin: int = begin) -> None:
                on_step(begin + number)

            some = rounds[begin : begin + size]
            yield from draw(stages, geometry, requests, some, settings, negative_prompt, stepped)
        return
    device = stages.device
    # what comes next begins only when all before it is done, or takes each batch as it comes
    hold = list if stages.apart else iter
    with stages.text() as encode:
        negative = _encoded(encode, negative_prompt) if settings.cfg != 1.0 else None
        batches = [[requests[i] for i in batch] for batch in rounds]
        # ranks that share an encoder work in step, so that none may leave a caption out
        texts = hold(_texts(encode, batches, once=stages.apart))
    del encode  # it holds the encoders
    with stages.transformer() as model:
        all_latents = hold(
            _latents(model, geometry, batches, texts, negative, settings, device, on_step)
        )
    del model
    with stages.codec() as codec:
        for batch, latents in zip(batches, all_latents, strict=True):
            yield torch.cat(
                [
                    _decoded(codec, one, device, request.prompt)
                    for request, one in zip(batch, latents.split(1), strict=True)
                ]
            )


def _texts(
    encode: TextEncoding, batches: Sequence[Sequence[Request]], once: bool
) -> Iterator[TextConditioning]:
    """Conditioning of each batch, on the CPU; with `once`, equal captions are encoded once."""
    known: dict[str, TextConditioning] = {}
    for requests in batches:
        found = []
        for caption in (request.prompt for request in requests):
            text = known.get(caption) or _encoded(encode, caption)
            if once:
                known[caption] = text
            found.append(text)
        yield TextConditioning(
            torch.cat([one.txt for one in found]), torch.cat([one.vec for one in found])
        )


def _encoded(encode: TextEncoding, caption: str) -> TextConditioning:
    """Conditioning of one caption, on the CPU."""
    text = encode([caption]).to("cpu")
    for name, part in (("T5", text.txt), ("CLIP", text.vec)):
        if not all_finite(part).all():
            raise NotFinite(
                f"{caption!r} is not finite as {name} encodes it, before the first step"
            )
    return text


def _latents(
    model: nn.Module,
    geometry: Geometry,
    batches: Sequence[Sequence[Request]],
    texts: Iterable[TextConditioning],
    negative: TextConditioning | None,
    settings: SampleSettings,
    device: torch.device,
    on_step: Callable[[int], object],
) -> Iterator[Float[Tensor, "b c h w"]]:
    """Latents of each batch, on the CPU."""
    negative = None if negative is None else negative.to(device)
    for number, (requests, text) in enumerate(zip(batches, texts, strict=True)):
        noise = [
            initial_noise(geometry, settings.size, settings.seed + one.again, one.index)
            for one in requests
        ]
        steps = itertools.count(1)

        def stepped(x: Tensor, number=number, requests=requests, steps=steps) -> None:
            step, finite = next(steps), all_finite(x).tolist()
            if not all(finite):  # one wait for the device in each step, small beside the step
                prompt = requests[finite.index(False)].prompt
                raise NotFinite(f"{prompt!r} is not finite at step {step} of {settings.steps}")
            on_step(number)

        latents = denoise(
            model,
            geometry,
            torch.stack(noise).to(device),
            text.to(device),
            negative,
            settings,
            stepped,
        )
        yield latents.cpu()


def _decoded(
    codec: Codec, latents: Float[Tensor, "1 ch h w"], device: torch.device, prompt: str
) -> Float[Tensor, "1 c H W"]:
    with torch.no_grad():
        image = displayable(codec.decode(latents.to(device))).cpu()
    if image.isnan().any():
        raise NotFinite(f"{prompt!r} is not finite once decoded, after the last step")
    return image


def gathered(
    images: Float[Tensor, "b c H W"],
    group: ProcessGroup | None,
    device: torch.device,
) -> list[Float[Tensor, "b c H W"]]:
    """Every rank's images of a round, on the CPU of all of them."""
    if group is None:
        return [images]
    mine = images.contiguous().to(device)
    every = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(every, mine, group=group)
    return [one.cpu() for one in every]
