"""Who draws what: every picture once, and every rank as many."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
from torch import nn

from torchtitan_flux.encoders.codec import PixelCodec
from torchtitan_flux.inference.draw import (
    MAX_IMAGES_PER_CHUNK,
    NotFinite,
    Request,
    assign,
    batches_of,
    draw,
    rounds_per_chunk,
)
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.model.inputs import TextConditioning
from torchtitan_flux.sampling.generate import SampleSettings

GEOMETRY = FLAVORS["flux-tiny"].geometry
SETTINGS = SampleSettings(ImageSize(16, 16), steps=2, seed=5)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 11, 30])
def test_every_picture_is_drawn_where_its_place_says(count, ranks, batch):
    where = assign(count, ranks, batch)
    assert len(where) == len(set(where)) == count
    of_rank = [batches_of(rank, where) for rank in range(ranks)]
    for number, place in enumerate(where):
        assert of_rank[place.rank][place.round][place.row] == number
        assert len(of_rank[place.rank][place.round]) == place.batch <= batch
    shapes = [[len(one) for one in rounds] for rounds in of_rank]
    assert all(one == shapes[0] for one in shapes), "ranks that share a model work in step"
    assert len(shapes[0]) == -(-count // (ranks * batch)), "no round too many"
    assert {i for rounds in of_rank for one in rounds for i in one} == set(range(count))


class Follows(nn.Module):
    """A velocity that depends on the caption."""

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y, guidance):
        return img * y[:, None, :1]


@dataclass
class Noted:
    """Parts of one line each, and what was done with them."""

    apart: bool
    device: torch.device
    done: list[str] = field(default_factory=list)
    model: nn.Module = field(default_factory=Follows)
    broken: str = ""
    """A part that makes what is not finite."""

    @contextmanager
    def text(self) -> Iterator:
        def encode(captions):
            self.done.append("caption")
            length = torch.tensor([[float(len(caption))] for caption in captions])
            if self.broken == "CLIP":
                length = length / 0
            return TextConditioning(length[:, None].clamp(max=99) / 99, length / 99)

        self.done.append("text")
        yield encode

    @contextmanager
    def transformer(self) -> Iterator:
        self.done.append("transformer")
        yield self.model

    @contextmanager
    def codec(self) -> Iterator:
        self.done.append("codec")
        # the latents as they are
        yield Overflows(16) if self.broken == "codec" else PixelCodec(16)


class Overflows(PixelCodec):
    def decode(self, latents):
        decoded = super().decode(latents)
        decoded[0, 0, 0, 0] = torch.inf
        return decoded


class Breaks(Follows):
    """One value of the second sample is not finite at the third call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, *inputs):
        velocity = super().forward(*inputs).clone()
        self.calls += 1
        if self.calls == 3:
            velocity[-1, 0, 1] = torch.nan
        return velocity


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(
    ("broken", "model", "said", "steps"),
    [
        ("", Breaks, "'b' is not finite at step 3 of 5", 2),
        ("CLIP", Follows, "'a' is not finite as CLIP encodes it, before the first step", 0),
        ("codec", Follows, "'a' is not finite once decoded, after the last step", 5),
    ],
)
def test_what_is_not_finite_ends_the_drawing_at_once(apart, broken, model, said, steps):
    """With the caption, and where it was seen; no later step is computed."""
    seen: list[int] = []
    stages = Noted(apart, torch.device("cpu"), model=model(), broken=broken)
    settings = replace(SETTINGS, steps=5)
    requests = [Request("a", 0), Request("b", 1)]
    with pytest.raises(NotFinite) as error:
        list(draw(stages, GEOMETRY, requests, [[0, 1]], settings, "", seen.append))
    assert str(error.value) == said
    assert len(seen) == steps


def test_the_next_picture_of_a_caption_is_the_first_of_the_next_seed():
    """So that it can be drawn alone: to the bit, where the shape of the batch is the same."""

    def drawn(requests, seed):
        stages = Noted(True, torch.device("cpu"))
        rounds = [[i] for i in range(len(requests))]
        settings = replace(SETTINGS, seed=seed)
        return torch.cat(list(draw(stages, GEOMETRY, requests, rounds, settings)))

    together = drawn([Request("a", 0), Request("a", 0, 1), Request("a", 0, 2)], seed=7)
    for again in range(3):
        assert torch.equal(together[again], drawn([Request("a", 0)], seed=7 + again)[0])
    assert not torch.equal(together[0], together[1])


def test_many_pictures_go_from_part_to_part_in_rounds_per_chunks():
    """Memory and the wait for the first picture do not grow with their number."""
    count, batch = 2 * MAX_IMAGES_PER_CHUNK + 3, 2
    requests = [Request("x" * (1 + i), i) for i in range(count)]
    rounds = batches_of(0, assign(count, 1, batch))
    found, steps = {}, {}
    stages = {apart: Noted(apart, torch.device("cpu")) for apart in (False, True)}
    for apart, one in stages.items():
        steps[apart] = []
        images = draw(one, GEOMETRY, requests, rounds, SETTINGS, "", steps[apart].append)
        first = next(images)
        if apart:
            assert one.done == ["text", *["caption"] * MAX_IMAGES_PER_CHUNK, "transformer", "codec"]
        found[apart] = torch.cat([first, *images])
    assert torch.equal(found[True], found[False])
    assert len(found[True]) == count
    assert len({tuple(image.flatten().tolist()) for image in found[True]}) == count
    assert steps[True] == steps[False] == [n for n in range(len(rounds)) for _ in range(2)]
    assert [stages[True].done.count(part) for part in ("text", "transformer", "codec")] == [3] * 3


def test_a_rounds_per_chunk_is_one_round_at_least():
    assert [rounds_per_chunk(batch) for batch in (1, 2, MAX_IMAGES_PER_CHUNK)] == [
        MAX_IMAGES_PER_CHUNK,
        MAX_IMAGES_PER_CHUNK // 2,
        1,
    ]
    assert rounds_per_chunk(3 * MAX_IMAGES_PER_CHUNK) == 1
