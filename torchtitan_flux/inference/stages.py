"""The three parts that a picture passes: text encoders, transformer, codec.

`Loaded` has all of them on the device. `OneAfterAnother` (--low_memory) loads each when its turn
comes and frees it before the next one, and has one or two blocks of T5 and of the transformer on
the device at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)
from torchtitan_flux.torchtitan_shim import give_back_freed_memory

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from torchtitan_flux.encoders.codec import Codec
from torchtitan_flux.encoders.pretrained import T5_KEY
from torchtitan_flux.encoders.text import CaptionTokenizer, ClipEncoder
from torchtitan_flux.encoders.text_weights import TextWeights
from torchtitan_flux.inference.memory import free_memory
from torchtitan_flux.inference.streaming import Streamed, block_sizes, can_be_kept, load_outside
from torchtitan_flux.inference.t5_files import Pages
from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.model.inputs import TextConditioning
from torchtitan_flux.paths import resolved_path
from torchtitan_flux.sampling.generate import TextEncoding
from torchtitan_flux.training.conditioning import FrozenParts, build_codec
from torchtitan_flux.weights.open import Weights


@runtime_checkable
class Stages(Protocol):
    """Each part, for as long as its context is open.

    Attributes:
        apart: only one context may be open at a time, and each is dear to open.
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
    parts: FrozenParts
    apart: bool = False

    @property
    def device(self) -> torch.device:
        return self.parts.device

    def text(self) -> AbstractContextManager[TextEncoding]:
        return nullcontext(self.parts.encode_captions)

    def transformer(self) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.model)

    def codec(self) -> AbstractContextManager[Codec]:
        return nullcontext(self.parts.codec)


@dataclass(frozen=True)
class OneAfterAnother:
    """Each part on the device only while it is needed.

    Attributes:
        config: job configuration.
        args: resolved model arguments.
        weights: of the transformer, opened; read block by block.
        tokenizer: of the text encoders.
        device: where they compute.
        dtype: of the weights and the computation.
    """

    config: Any
    args: FluxModelArgs
    weights: Weights
    tokenizer: CaptionTokenizer
    device: torch.device
    dtype: torch.dtype
    apart: bool = True

    @contextmanager
    def text(self) -> Iterator[TextEncoding]:
        weights = TextWeights(T5_KEY, resolved_path(self.config.encoder.t5_encoder), Pages())
        t5 = _empty_t5(weights.config)
        clip = ClipEncoder(
            resolved_path(self.config.encoder.clip_encoder), device=self.device, dtype=self.dtype
        )

        def encode(captions: Sequence[str]) -> TextConditioning:
            t5_tokens, clip_tokens = zip(*map(self.tokenizer, captions), strict=True)
            with torch.no_grad():
                txt = t5(input_ids=torch.stack(t5_tokens).to(self.device)).last_hidden_state
                return TextConditioning(txt, clip(torch.stack(clip_tokens).to(self.device)))

        blocks = {f"encoder.block.{i}": block for i, block in enumerate(t5.encoder.block)}
        with self._streamed(t5, blocks, lambda name: weights.read(name, self.dtype)):
            # one embedding under two names
            t5.encoder.set_input_embeddings(t5.shared)
            yield encode

    @contextmanager
    def transformer(self) -> Iterator[nn.Module]:
        with torch.device("meta"):
            model = FluxModel(self.args)
        model.eval().requires_grad_(False)
        blocks = {
            f"{kind}.{number}": block
            for kind in ("double_blocks", "single_blocks")
            for number, block in getattr(model, kind).items()
        }
        with self._streamed(model, blocks, lambda name: self.weights.read(name, dtype=self.dtype)):
            yield model

    @contextmanager
    def codec(self) -> Iterator[Codec]:
        yield build_codec(self.config, self.args, self.device, self.dtype)

    @contextmanager
    def _streamed(
        self, model: nn.Module, blocks: dict[str, nn.Module], read: Callable[[str], Tensor]
    ) -> Iterator[None]:
        load_outside(model, list(blocks), read, self.device, self.dtype)
        # looked at only now, when what came before has been freed
        free = free_memory(torch.device("cpu"))
        keep = can_be_kept(block_sizes(list(blocks.values()), self.dtype), free)
        streamed = Streamed(blocks, read, self.device, self.dtype, keep)
        try:
            yield
        finally:
            streamed.close()
            model.to("meta")
            if self.device.type == "cpu":
                give_back_freed_memory()
            else:
                torch.cuda.empty_cache()
                torch._C._host_emptyCache()  # pinned memory; torch keeps it for itself otherwise


def _empty_t5(config: T5Config) -> T5EncoderModel:
    """T5's encoder on the meta device, as `from_pretrained` would make it."""
    with torch.device("meta"):
        model = T5EncoderModel._from_config(config)
    return model.eval().requires_grad_(False)
