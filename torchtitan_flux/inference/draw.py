"""Pictures in rounds: all ranks draw a batch each, and the pictures of a round are there at once.

Captions are encoded and latents decoded one at a time, so that a picture depends on nothing but its
own request and the shape of the batch that the transformer saw: that shape, and the picture's place
in it, are recorded, and the same call gives the same bits.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from torchtitan_flux.encoders.codec import Codec
from torchtitan_flux.generate import (
    SampleSettings,
    TextConditioning,
    TextEncoding,
    denoise,
    initial_noise,
)
from torchtitan_flux.inference.stages import Stages
from torchtitan_flux.latents import Geometry

AT_ONCE = 32
"""Pictures of a rank that go together from part to part, where parts take turns: so that memory
does not grow with their number, and the first are there before the last are begun."""


@dataclass(frozen=True)
class Request:
    """A picture to draw: its caption, and the number that its noise is drawn by."""

    prompt: str
    index: int


@dataclass(frozen=True)
class Place:
    """Where a picture is drawn: which round, and which row of which rank's batch of `batch`."""

    round: int
    rank: int
    row: int
    batch: int


def places(count: int, ranks: int, batch_size: int) -> list[Place]:
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


def portion(batch: int) -> int:
    """Rounds that go together from part to part, at least one."""
    return max(1, AT_ONCE // batch)


def draw(
    stages: Stages,
    geometry: Geometry,
    requests: Sequence[Request],
    rounds: Sequence[Sequence[int]],
    settings: SampleSettings,
    negative_prompt: str = "",
    on_step: Callable[[int], None] = lambda round: None,
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
    """
    if stages.apart and len(rounds) > (size := portion(len(rounds[0]))):
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
        negative = _to(encode([negative_prompt]), "cpu") if settings.cfg != 1.0 else None
        captions = [[requests[i].prompt for i in batch] for batch in rounds]
        # ranks that share an encoder work in step, so that none may leave a caption out
        texts = hold(_texts(encode, captions, once=stages.apart))
    del encode  # it holds the encoders
    with stages.transformer() as model:
        indices = [[requests[i].index for i in batch] for batch in rounds]
        all_latents = hold(
            _latents(model, geometry, indices, texts, negative, settings, device, on_step)
        )
    del model
    with stages.codec() as codec:
        for latents in all_latents:
            yield torch.cat([_decoded(codec, one, device) for one in latents.split(1)])


def _texts(
    encode: TextEncoding, batches: Sequence[Sequence[str]], once: bool
) -> Iterator[TextConditioning]:
    """Conditioning of each batch, on the CPU; with `once`, equal captions are encoded once."""
    known: dict[str, TextConditioning] = {}
    for captions in batches:
        found = []
        for caption in captions:
            text = known.get(caption) or _to(encode([caption]), "cpu")
            if once:
                known[caption] = text
            found.append(text)
        yield TextConditioning(
            torch.cat([one.txt for one in found]), torch.cat([one.vec for one in found])
        )


def _latents(
    model: nn.Module,
    geometry: Geometry,
    batches: Sequence[Sequence[int]],
    texts: Iterable[TextConditioning],
    negative: TextConditioning | None,
    settings: SampleSettings,
    device: torch.device,
    on_step: Callable[[int], None],
) -> Iterator[Float[Tensor, "b c h w"]]:
    """Latents of each batch, on the CPU."""
    negative = None if negative is None else _to(negative, device)
    for number, (indices, text) in enumerate(zip(batches, texts, strict=True)):
        noise = [initial_noise(geometry, settings.size, settings.seed, i) for i in indices]
        latents = denoise(
            model,
            geometry,
            torch.stack(noise).to(device),
            _to(text, device),
            negative,
            settings,
            functools.partial(on_step, number),
        )
        yield latents.cpu()


def _decoded(
    codec: Codec, latents: Float[Tensor, "1 ch h w"], device: torch.device
) -> Float[Tensor, "1 c H W"]:
    with torch.no_grad():
        return codec.decode(latents.to(device)).float().clamp(-1, 1).cpu()


def _to(text: TextConditioning, device: torch.device | str) -> TextConditioning:
    return TextConditioning(text.txt.to(device), text.vec.to(device))


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
