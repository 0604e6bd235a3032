"""What the model is trained on comes from the encoders, or was encoded before."""

from dataclasses import replace

import torch

from torchtitan_flux.data.batch import Latents, Pixels, Tokens, TrainingBatch, stack
from torchtitan_flux.encoders.codec import PixelCodec
from torchtitan_flux.encoders.text import ClipEncoder, T5Encoder
from torchtitan_flux.encoders.tokenizer import CaptionTokenizer
from torchtitan_flux.latents import Geometry, ImageSize
from torchtitan_flux.model.inputs import TextConditioning
from torchtitan_flux.paths import PACKAGE
from torchtitan_flux.training.conditioning import FrozenEncoders

T5, CLIP = (PACKAGE / "assets" / "tiny" / name for name in ("t5", "clip"))
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def test_encoded_samples_give_what_pixels_and_tokens_give():
    tokenizer = CaptionTokenizer(T5, CLIP, 16)
    t5, clip = T5Encoder(T5, **CPU), ClipEncoder(CLIP, **CPU)
    encoders = FrozenEncoders(
        tokenizer, t5, clip, PixelCodec(3), Geometry(3, 1, 2), torch.device("cpu")
    )
    rows = []
    t5.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    samples = [
        TrainingBatch(
            picture=Pixels(torch.rand(3, 4, 6) * 2 - 1),
            text=Tokens(*tokenizer(caption)),
            noise=torch.randn(3, 4, 6),
            position=torch.tensor(position),
            t=torch.tensor(0.5),
        )
        for position, caption in enumerate(("a cat", "", ""))
    ]
    found = encoders.encode(stack(samples))
    assert rows == [2]  # equal captions are encoded once
    assert found.size == ImageSize(4, 6)
    assert found.latents.shape == found.noise.shape == (3, 6, 12)
    cached = [
        replace(one, picture=Latents(one.picture.image), text=TextConditioning(txt, vec))
        for one, txt, vec in zip(samples, found.text.txt, found.text.vec, strict=True)
    ]
    again = encoders.encode(stack(cached))
    assert rows == [2]
    assert torch.equal(again.latents, found.latents)
    assert torch.equal(again.noise, found.noise)
    assert torch.equal(again.text.txt, found.text.txt)
    assert torch.equal(again.text.vec, found.text.vec)
