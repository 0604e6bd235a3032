"""The three parts that a picture passes: text encoders, transformer, codec.

`Loaded` has all of them on the device. `OneAfterAnother` (--low_memory) loads each when its turn
comes and frees it before the next one; accelerate's hooks bring T5's and the transformer's blocks
from CPU memory to the device one at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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
from torchtitan_flux.weights.load import import_weights
from torchtitan_flux.weights.open import Weights

BLOCKS = ["T5Block", "DoubleStreamBlock", "SingleStreamBlock"]
"""Modules that come to the device as a whole."""


@runtime_checkable
class Stages(Protocol):
    """Each part, for as long as its context is open.

    Attributes:
        apart: only one context may be open at a time, and each is expensive to open.
        device: where they compute.
    """

    @property
    def apart(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    def text(self) -> AbstractContextManager[TextEncoding]: ...

    def transformer(self) -> AbstractContextManager[nn.Module]: ...

    def codec(self) -> AbstractContextManager[Codec]: ...


@dataclass(frozen=True)
class Loaded:
    """All on the device, for as long as this lives."""

    model: nn.Module
    encoders: FrozenEncoders
    apart: bool = False

    @property
    def device(self) -> torch.device:
        return self.encoders.device

    def text(self) -> AbstractContextManager[TextEncoding]:
        return nullcontext(self.encoders.encode_captions)

    def transformer(self) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.model)

    def codec(self) -> AbstractContextManager[Codec]:
        return nullcontext(self.encoders.codec)


@dataclass(frozen=True)
class OneAfterAnother:
    """Each part in memory only while it is needed, each block on the device while it computes.

    Attributes:
        config: job configuration.
        args: resolved model arguments.
        weights: of the transformer, opened.
        tokenizer: of the text encoders.
        device: where they compute.
        dtype: of the weights and the computation.
    """

    config: FluxJobConfig
    args: FluxModelArgs
    weights: Weights
    tokenizer: CaptionTokenizer
    device: torch.device
    dtype: torch.dtype
    apart: bool = True

    @contextmanager
    def text(self) -> Iterator[TextEncoding]:
        paths = self.config.encoder
        t5 = T5Encoder(
            resolved_path(paths.t5_encoder), device=torch.device("cpu"), dtype=self.dtype
        )
        clip = ClipEncoder(resolved_path(paths.clip_encoder), device=self.device, dtype=self.dtype)

        @torch.no_grad()
        def encode(captions: Sequence[str]) -> TextConditioning:
            t5_tokens, clip_tokens = zip(*map(self.tokenizer, captions), strict=True)
            return TextConditioning(
                t5(torch.stack(t5_tokens).to(self.device)),
                clip(torch.stack(clip_tokens).to(self.device)),
            )

        with self._offloaded(t5):
            yield encode

    @contextmanager
    def transformer(self) -> Iterator[nn.Module]:
        with torch.device("meta"):
            model = FluxModel(self.args).to(self.dtype)
        model.to_empty(device="cpu")
        import_weights(dict(model.named_parameters()), self.weights)
        model.eval().requires_grad_(False)
        with self._offloaded(model):
            yield model

    @contextmanager
    def codec(self) -> Iterator[Codec]:
        yield build_codec(self.config, self.args, self.device, self.dtype)

    @contextmanager
    def _offloaded(self, model: nn.Module) -> Iterator[None]:
        """Blocks of a model on the CPU are brought to the device for their forward pass."""
        if self.device.type != "cpu":
            from accelerate import cpu_offload

            cpu_offload(model, self.device, preload_module_classes=BLOCKS)
        try:
            yield
        finally:
            model.to_empty(device="meta")
            give_back_freed_memory()
            if self.device.type != "cpu":
                torch.cuda.empty_cache()
