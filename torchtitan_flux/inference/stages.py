"""The three parts that a picture passes: text encoders, transformer, codec.

`all_loaded` has them on the device. `low_memory_stages` loads each when its turn comes and frees it
before the next one; accelerate's hooks bring T5's and the transformer's blocks from CPU memory to
the device one at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)
from torchtitan_flux.torchtitan_shim import give_back_freed_memory

import torch
from torch import nn

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.encoders.codec import Codec
from torchtitan_flux.encoders.text import CaptionTokenizer, ClipEncoder, T5Encoder
from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.model.inputs import TextConditioning
from torchtitan_flux.paths import resolved_path
from torchtitan_flux.sampling.generate import TextEncoding
from torchtitan_flux.training.conditioning import FrozenEncoders, build_codec
from torchtitan_flux.weights.open import Weights, import_weights

BLOCKS = ["T5Block", "DoubleStreamBlock", "SingleStreamBlock"]
"""Modules that come to the device as a whole."""


@dataclass(frozen=True)
class Stages:
    """Each part, for as long as its context is open.

    Attributes:
        device: where they compute.
        sequential: only one context may be open at a time, and each is expensive to open.
    """

    text: Callable[[], AbstractContextManager[TextEncoding]]
    transformer: Callable[[], AbstractContextManager[nn.Module]]
    codec: Callable[[], AbstractContextManager[Codec]]
    device: torch.device
    sequential: bool


def all_loaded(model: nn.Module, encoders: FrozenEncoders) -> Stages:
    """All on the device, for as long as this lives."""
    return Stages(
        lambda: nullcontext(encoders.encode_captions),
        lambda: nullcontext(model),
        lambda: nullcontext(encoders.codec),
        encoders.device,
        sequential=False,
    )


def low_memory_stages(
    config: FluxJobConfig,
    args: FluxModelArgs,
    weights: Weights,
    tokenizer: CaptionTokenizer,
    device: torch.device,
    dtype: torch.dtype,
) -> Stages:
    """Each part in memory only while it is needed, each block on the device while it computes."""

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

    @contextmanager
    def codec() -> Iterator[Codec]:
        yield build_codec(config, args, device, dtype)

    return Stages(text, transformer, codec, device, sequential=True)
