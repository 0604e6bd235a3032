"""The frozen parts around the model: text encoders and codec, built once, shared by all callers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.encoders.autoencoder import load_autoencoder
from torchtitan_flux.encoders.codec import Codec, PixelCodec
from torchtitan_flux.encoders.text import CaptionTokenizer, ClipEncoder, T5Encoder
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.model.inputs import TextConditioning
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.parallelize import OTHER_TRAINER, shard_text_encoder
from torchtitan_flux.paths import resolved_path
from torchtitan_flux.training.transfer import sent


def build_tokenizer(config: FluxJobConfig) -> CaptionTokenizer:
    """The tokenizers that belong to the two text encoders (torchtitan's TokenizerBuilder).

    Raises:
        RuntimeError: under a trainer that did not load FLUX's configuration.
    """
    if not hasattr(config, "flow"):
        raise RuntimeError(OTHER_TRAINER)
    encoder = config.encoder
    return CaptionTokenizer(
        resolved_path(encoder.t5_encoder),
        resolved_path(encoder.clip_encoder),
        encoder.max_t5_encoding_len,
    )


@dataclass
class FrozenParts:
    """Tokenizer, text encoders and codec on the training device."""

    tokenizer: CaptionTokenizer
    t5: T5Encoder
    clip: ClipEncoder
    codec: Codec
    device: torch.device

    @torch.no_grad()
    def encode_tokens(
        self, t5_tokens: Int[Tensor, "b length"], clip_tokens: Int[Tensor, "b 77"]
    ) -> TextConditioning:
        """Text features [b, length, context] and pooled vector [b, width].

        A caption that a batch holds several times, as the empty one often is, is encoded once.
        """
        txt, which_txt = self._once(self.t5, t5_tokens)
        vec, which_vec = self._once(self.clip, clip_tokens)
        return TextConditioning(txt[which_txt], vec[which_vec])

    def _once(self, encoder: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encodings of the distinct rows, and which of them each row has."""
        distinct, which = torch.unique(tokens.cpu(), dim=0, return_inverse=True)
        return encoder(sent(distinct, self.device)), sent(which, self.device)

    def encode_captions(self, captions: Sequence[str]) -> TextConditioning:
        """Tokenise and encode captions; "" is the empty prompt of inference."""
        t5_tokens, clip_tokens = zip(*map(self.tokenizer, captions), strict=True)
        return self.encode_tokens(torch.stack(t5_tokens), torch.stack(clip_tokens))

    @torch.no_grad()
    def encode_images(
        self, images: Float[Tensor, "b c H W"], noise: Float[Tensor, "b ch h w"] | None
    ) -> Float[Tensor, "b ch h w"]:
        """Latents in float32: a posterior sample with `noise`, the mean without."""
        noise = None if noise is None else sent(noise, self.device)
        return self.codec.encode(sent(images, self.device), noise).float()


def build_frozen_parts(
    config: FluxJobConfig,
    args: FluxModelArgs,
    tokenizer: CaptionTokenizer,
    dims: FluxParallelDims,
    device: torch.device,
    dtype: torch.dtype,
) -> FrozenParts:
    """Load the encoders and the codec that the configuration names.

    Args:
        config: job configuration.
        args: resolved model arguments.
        tokenizer: of the two text encoders.
        dims: T5 is sharded over the data ranks where there are several.
        device: where they run.
        dtype: their weights' and compute dtype.
    """
    encoder = config.encoder
    t5 = T5Encoder(resolved_path(encoder.t5_encoder), device=device, dtype=dtype)
    if dims.data_mesh.size() > 1:
        shard_text_encoder(t5, dims.data_mesh)
    clip = ClipEncoder(resolved_path(encoder.clip_encoder), device=device, dtype=dtype)
    codec = build_codec(config, args, device, dtype)
    return FrozenParts(tokenizer, t5, clip, codec, device)


def build_codec(
    config: FluxJobConfig, args: FluxModelArgs, device: torch.device, dtype: torch.dtype
) -> Codec:
    """The codec that the configuration names; of a flavor in pixel space, the identity."""
    if args.pixel_space:
        return PixelCodec(config.encoder.pixel_channels)
    path = resolved_path(config.encoder.autoencoder_path)
    return load_autoencoder(path, device=device, dtype=dtype)
