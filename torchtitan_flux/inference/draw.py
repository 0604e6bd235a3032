"""Pictures in rounds: all ranks draw a batch each, and the pictures of a round are there at once.

Captions are encoded and latents decoded one at a time, so that a picture depends on nothing but its
own request and the shape of the batch that the transformer saw.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)
from torchtitan_flux.torchtitan_shim import give_back_freed_memory

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchtitan.tools.logging import logger
from tqdm import tqdm

from torchtitan_flux.collectives import all_gather_rows, shard_rows
from torchtitan_flux.encoders.codec import Codec
from torchtitan_flux.encoders.text import ClipEncoder, T5Encoder
from torchtitan_flux.image_file import save_picture
from torchtitan_flux.inference.open_run import InferenceContext, load_model
from torchtitan_flux.inference.picture import Picture, unwritable
from torchtitan_flux.latents import Geometry
from torchtitan_flux.model import FluxModel
from torchtitan_flux.model.inputs import TextConditioning
from torchtitan_flux.paths import resolved_path
from torchtitan_flux.sampling.generate import (
    TextEncoding,
    denoise,
    displayable,
    initial_noise,
    to_pil,
)
from torchtitan_flux.training.conditioning import build_codec, build_tokenizer
from torchtitan_flux.weights.open import import_weights

MAX_IMAGES_PER_CHUNK = 32
"""Pictures of a rank that go together through sequential stages, so that memory does not grow with
their number and the first are written before the last are started."""
BLOCKS = ["T5Block", "DoubleStreamBlock", "SingleStreamBlock"]
"""Modules that come to the device as a whole."""


class NotFinite(RuntimeError):
    """A picture has values that are infinite or no number; says which one."""


@dataclass(frozen=True)
class Stages:
    """The three parts that a picture passes, each for as long as its context is open.

    Attributes:
        device: where they compute.
        sequential: only one context may be open at a time, and each is expensive to open.
    """

    text: Callable[[], AbstractContextManager[TextEncoding]]
    transformer: Callable[[], AbstractContextManager[nn.Module]]
    codec: Callable[[], AbstractContextManager[Codec]]
    device: torch.device
    sequential: bool


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
    stages = low_memory_stages(context) if low_memory else all_loaded(context)
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
    batches: Sequence[Sequence[Picture]],
    on_step: Callable[[int], object] = lambda count: None,
) -> Iterator[Float[Tensor, "b c H W"]]:
    """This rank's images of each batch, in [-1, 1], float32, on the CPU.

    Args:
        stages: text encoders, transformer and codec; of ranks that share them, all have to call.
        batches: pictures whose settings differ in nothing but the seed.
        on_step: called after each step of a batch, with the number of its pictures.

    Raises:
        NotFinite: once that is seen.
    """
    device, first = stages.device, batches[0][0]
    settings, size = first.settings, first.settings.size
    # a sequential stage ends before the next one begins; others pass each batch on as it comes
    chunk = max(1, MAX_IMAGES_PER_CHUNK // len(batches[0])) if stages.sequential else 1
    for begin in range(0, len(batches), chunk):
        some = batches[begin : begin + chunk]
        with stages.text() as encode:

            def encoded(caption: str, encode: TextEncoding = encode) -> TextConditioning:
                return encode([caption]).to("cpu")

            # ranks that share an encoder work in step, so that none may leave a caption out
            once = cache(encoded) if stages.sequential else encoded
            negative = once(first.negative_prompt).to(device) if settings.cfg != 1.0 else None
            texts = [[once(picture.prompt) for picture in batch] for batch in some]
        latents = []
        with stages.transformer() as model:
            for batch, text in zip(some, texts, strict=True):
                noise = [initial_noise(geometry, size, p.settings.seed, p.index) for p in batch]
                x = denoise(
                    model,
                    geometry,
                    torch.stack(noise).to(device),
                    TextConditioning(
                        torch.cat([one.txt for one in text]), torch.cat([one.vec for one in text])
                    ).to(device),
                    negative,
                    settings,
                    lambda _, batch=batch: on_step(len(batch)),
                )
                latents.append(x.cpu())
        with stages.codec() as codec:
            for batch, x in zip(some, latents, strict=True):
                images = [displayable(codec.decode(one.to(device))).cpu() for one in x.split(1)]
                for picture, image in zip(batch, images, strict=True):
                    if image.isnan().any():
                        raise NotFinite(f"{picture.prompt!r} is not finite")
                yield torch.cat(images)


def all_loaded(context: InferenceContext) -> Stages:
    """All on the device, for as long as this lives."""
    model, encoders = load_model(context)
    return Stages(
        lambda: nullcontext(encoders.encode_captions),
        lambda: nullcontext(model),
        lambda: nullcontext(encoders.codec),
        encoders.device,
        sequential=False,
    )


def low_memory_stages(context: InferenceContext) -> Stages:
    """Each part loaded when its turn comes and freed before the next one.

    accelerate's hooks bring T5's and the transformer's blocks from CPU memory to the device one at
    a time.
    """
    config, args, device, dtype = context.config, context.args, context.device, context.dtype
    weights, tokenizer = context.open_weights(), build_tokenizer(config)

    @contextmanager
    def offloaded(model: nn.Module) -> Iterator[None]:
        """Blocks of a model on the CPU are brought to the device for their forward pass."""
        if device.type != "cpu":
            from accelerate import cpu_offload

            cpu_offload(model, device, preload_module_classes=BLOCKS)
        try:
            yield
        finally:
            model.to_empty(device="meta")
            give_back_freed_memory()
            if device.type != "cpu":
                torch.cuda.empty_cache()

    @contextmanager
    def text() -> Iterator[TextEncoding]:
        names = config.encoder
        t5 = T5Encoder(resolved_path(names.t5_encoder), device=torch.device("cpu"), dtype=dtype)
        clip = ClipEncoder(resolved_path(names.clip_encoder), device=device, dtype=dtype)

        @torch.no_grad()
        def encode(captions: Sequence[str]) -> TextConditioning:
            t5_tokens, clip_tokens = zip(*map(tokenizer, captions), strict=True)
            return TextConditioning(
                t5(torch.stack(t5_tokens).to(device)), clip(torch.stack(clip_tokens).to(device))
            )

        with offloaded(t5):
            yield encode

    @contextmanager
    def transformer() -> Iterator[nn.Module]:
        with torch.device("meta"):
            model = FluxModel(args).to(dtype)
        model.to_empty(device="cpu")
        import_weights(dict(model.named_parameters()), weights)
        model.eval().requires_grad_(False)
        with offloaded(model):
            yield model

    def codec() -> AbstractContextManager[Codec]:
        return nullcontext(build_codec(config, args, device, dtype))

    return Stages(text, transformer, codec, device, sequential=True)
