"""What the model is trained on: encoders behind one protocol, and the frozen ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from torchtitan_flux.collectives import all_gather_rows, shard_rows
from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.data.batch import Batch, Pixels, Tokens
from torchtitan_flux.encoders.autoencoder import load_autoencoder
from torchtitan_flux.encoders.codec import Codec, PixelCodec
from torchtitan_flux.encoders.text import ClipEncoder, T5Encoder
from torchtitan_flux.encoders.tokenizer import CaptionTokenizer
from torchtitan_flux.latents import Geometry, ImageSize, pack
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.model.inputs import TextConditioning
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.parallelize import OTHER_TRAINER, shard_text_encoder
from torchtitan_flux.paths import resolved_path
from torchtitan_flux.training.transfer import sent


@dataclass(frozen=True)
class EncodedBatch:
    """What the model is trained on, on its device; `size` is that of the images, in pixels."""

    latents: Float[Tensor, "b tokens features"]
    noise: Float[Tensor, "b tokens features"]
    text: TextConditioning
    size: ImageSize


@runtime_checkable
class Encoders(Protocol):
    """Make of a batch what the model is trained on."""

    def encode(self, batch: Batch) -> EncodedBatch: ...


@dataclass
class FrozenEncoders:
    """Text encoders and codec on the training device; `Encoders` for training and validation.

    `peers` are ranks that have the same batches, and encode a part of each; None for one.
    """

    tokenizer: CaptionTokenizer
    t5: T5Encoder
    clip: ClipEncoder
    codec: Codec
    geometry: Geometry
    device: torch.device
    peers: ProcessGroup | None = None

    @torch.no_grad()
    def encode(self, batch: Batch) -> EncodedBatch:
        """Encode a batch; what comes encoded already is passed on."""
        picture, text, patch = batch.picture, batch.text, self.geometry.patch
        if isinstance(picture, Pixels):
            latents = self._encode_images(picture)
        else:
            latents = sent(picture.latents, self.device).float()
        text = self._encode_tokens(text) if isinstance(text, Tokens) else text.to(self.device)
        size = ImageSize(*(side * self.geometry.downscale for side in latents.shape[-2:]))
        noise = sent(batch.noise, self.device)
        return EncodedBatch(pack(latents, patch), pack(noise, patch), text, size)

    def encode_captions(self, captions: Sequence[str]) -> TextConditioning:
        """Tokenise and encode captions that only this rank has; "" is the empty prompt."""
        t5, clip = (torch.stack(rows) for rows in zip(*map(self.tokenizer, captions), strict=True))
        with torch.no_grad():
            return TextConditioning(self._distinct(self.t5, t5), self._distinct(self.clip, clip))

    def _encode_images(self, pixels: Pixels) -> Float[Tensor, "b ch h w"]:
        """Latents in float32: a posterior sample with noise, the mean without."""
        noise = pixels.posterior_noise
        if noise is not None:
            noise = sent(shard_rows(noise, self.peers), self.device)
        images = sent(shard_rows(pixels.image, self.peers), self.device)
        latents = self.codec.encode(images, noise).float()
        return all_gather_rows(latents, len(pixels.image), self.peers)

    def _encode_tokens(self, tokens: Tokens) -> TextConditioning:
        def encoded(encoder: nn.Module, rows: Tensor) -> Tensor:
            part = self._distinct(encoder, shard_rows(rows, self.peers))
            return all_gather_rows(part, len(rows), self.peers)

        return TextConditioning(encoded(self.t5, tokens.t5), encoded(self.clip, tokens.clip))

    def _distinct(self, encoder: nn.Module, tokens: Tensor) -> Tensor:
        """Encodings of all rows; equal ones, as of the empty caption, are encoded once."""
        distinct, which = torch.unique(tokens.cpu(), dim=0, return_inverse=True)
        return encoder(sent(distinct, self.device))[sent(which, self.device)]


def build_tokenizer(config: FluxJobConfig) -> CaptionTokenizer:
    """The tokenizers of the two text encoders (torchtitan's TokenizerBuilder)."""
    if not hasattr(config, "flow"):
        raise RuntimeError(OTHER_TRAINER)
    encoder = config.encoder
    return CaptionTokenizer(
        resolved_path(encoder.t5_encoder),
        resolved_path(encoder.clip_encoder),
        encoder.max_t5_encoding_len,
    )


def build_frozen_encoders(
    config: FluxJobConfig,
    args: FluxModelArgs,
    tokenizer: CaptionTokenizer,
    dims: FluxParallelDims,
    device: torch.device,
    dtype: torch.dtype,
) -> FrozenEncoders:
    """The configured encoders and codec; T5 is sharded over the data ranks, if several."""
    encoder = config.encoder
    t5 = T5Encoder(resolved_path(encoder.t5_encoder), device=device, dtype=dtype)
    if dims.data_mesh.size() > 1:
        shard_text_encoder(t5, dims.data_mesh)
    clip = ClipEncoder(resolved_path(encoder.clip_encoder), device=device, dtype=dtype)
    codec = build_codec(config, args, device, dtype)
    return FrozenEncoders(tokenizer, t5, clip, codec, args.geometry, device, dims.peer_group)


def build_codec(
    config: FluxJobConfig, args: FluxModelArgs, device: torch.device, dtype: torch.dtype
) -> Codec:
    """The codec that the configuration names; of a flavor in pixel space, the identity."""
    if args.pixel_space:
        return PixelCodec(config.encoder.pixel_channels)
    path = resolved_path(config.encoder.autoencoder_path)
    return load_autoencoder(path, device=device, dtype=dtype)
