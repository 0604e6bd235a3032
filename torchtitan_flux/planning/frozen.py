"""What the frozen encoders and the codec need on one rank.

Sizes come from what is configured. Where it has not been downloaded yet they are those of the parts
that FLUX.1 was published with:

| part | parameters | source |
|---|---|---|
| T5-XXL v1.1, encoder | 4,762,310,656 | config.json of google/t5-v1_1-xxl |
| CLIP-L/14, text model | 123,060,480 | text_config of openai/clip-vit-large-patch14 |
| autoencoder | 83,819,683 | Black Forest Labs' reference, `AutoencoderArgs` |
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchtitan.tools import utils
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.encoders.autoencoder import Autoencoder, AutoencoderArgs, StoredAutoencoder
from torchtitan_flux.encoders.autoencoder_layers import parameter_shapes
from torchtitan_flux.encoders.pretrained import read_clip_config, read_t5_config
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.paths import resolved_path
from torchtitan_flux.planning.tracker import MemoryTracker

T5_XXL = T5Config(
    d_model=4096,
    d_ff=10240,
    d_kv=64,
    num_heads=64,
    num_layers=24,
    vocab_size=32128,
    feed_forward_proj="gated-gelu",
)
CLIP_L = CLIPTextConfig(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    vocab_size=49408,
    max_position_embeddings=77,
)


@dataclass(frozen=True)
class Frozen:
    """Bytes on one rank.

    Attributes:
        t5, clip, codec: weights, T5's of this rank's shard.
        encoding: most that is needed beside the weights while a batch is encoded.
        drawing: the same while pictures are decoded; 0 where none are drawn.
        known: names of the parts that were taken from the table above.
    """

    t5: int
    clip: int
    codec: int
    encoding: int
    drawing: int
    known: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        return self.t5 + self.clip + self.codec


def frozen_parts(
    config: FluxJobConfig, args: FluxModelArgs, shard: int, dtype: torch.dtype
) -> Frozen:
    """Sizes of the configured encoders and codec.

    Args:
        config: job configuration.
        args: resolved model arguments.
        shard: ranks that T5 is sharded over; 1 keeps it whole.
        dtype: of the weights and the computation.
    """
    t5, clip, shape, known = configured_parts(config, args)
    size = dtype.itemsize
    t5_all, t5_block = _t5_parameters(t5.to_json_string())
    batch, tokens = config.training.local_batch_size, config.encoder.max_t5_encoding_len
    # gathered: the embedding, a block, and the next one
    gathered = (t5.vocab_size * t5.d_model + 2 * t5_block) * size if shard > 1 else 0
    encoding = gathered + t5_work(t5, batch, tokens, size)
    codec = drawing = 0
    if shape is not None:
        codec = _autoencoder_parameters(shape) * size
        image = config.training.image_size
        encoding = max(encoding, _codec_work(shape, "encode", batch, image, dtype))
        if config.sampling.enable:
            drawn = config.sampling.local_batch_size
            drawing = _codec_work(shape, "decode", drawn, image, dtype)
    clip_all = clip_parameters(clip.to_json_string())
    return Frozen(
        math.ceil(t5_all / shard) * size, clip_all * size, codec, encoding, drawing, tuple(known)
    )


def frozen_weights(config: FluxJobConfig, args: FluxModelArgs, shard: int, size: int) -> int:
    """Bytes of their weights alone; `size` of an element."""
    t5, clip, shape, _ = configured_parts(config, args)
    codec = 0 if shape is None else _autoencoder_parameters(shape)
    t5_all, _ = _t5_parameters(t5.to_json_string())
    return (t5_all // shard + clip_parameters(clip.to_json_string()) + codec) * size


def configured_parts(
    config: FluxJobConfig, args: FluxModelArgs
) -> tuple[T5Config, CLIPTextConfig, AutoencoderArgs | None, list[str]]:
    """What is configured, or FLUX.1's own, and the names of the latter; no codec in pixel space."""
    encoder = config.encoder
    t5, clip, shape, known = T5_XXL, CLIP_L, None, []
    try:
        t5 = read_t5_config(resolved_path(encoder.t5_encoder))
    except (OSError, ValueError):
        known.append("T5-XXL")
    try:
        clip = read_clip_config(resolved_path(encoder.clip_encoder))
    except (OSError, ValueError):
        known.append("CLIP-L")
    if not args.pixel_space:
        try:
            shape = StoredAutoencoder(Path(resolved_path(encoder.autoencoder_path))).args
        except (OSError, ValueError):
            shape = AutoencoderArgs()
            known.append("autoencoder")
    return t5, clip, shape, known


def t5_work(t5: T5Config, batch: int, tokens: int, size: int) -> int:
    """Most bytes beside the weights while captions are encoded; `size` of an element.

    A block's activations or, as T5 attends without flash attention, its scores in float32.
    """
    worked = batch * tokens * (2 * t5.d_model + 3 * t5.d_ff) * size
    scores = 3 * batch * t5.num_heads * tokens * tokens * 4
    return max(worked, scores)


@functools.lru_cache
def _t5_parameters(config: str) -> tuple[int, int]:
    """(all, in one block) of T5's encoder."""
    with torch.device("meta"):
        model = T5EncoderModel(T5Config.from_dict(json.loads(config)))
    block = sum(p.numel() for p in model.encoder.block[-1].parameters())
    return sum(p.numel() for p in model.parameters()), block


@functools.lru_cache
def clip_parameters(config: str) -> int:
    """Of CLIP's text model, by its configuration as JSON."""
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig.from_dict(json.loads(config)))
    return sum(p.numel() for p in model.parameters())


@functools.lru_cache
def _autoencoder_parameters(shape: AutoencoderArgs) -> int:
    return sum(math.prod(size) for size in parameter_shapes(shape).values())


@functools.lru_cache
def _codec_work(
    shape: AutoencoderArgs, what: str, batch: int, image: ImageSize, dtype: torch.dtype
) -> int:
    """Most bytes alive beside the weights, on fake tensors."""
    height, width = image.height, image.width
    tracker = MemoryTracker()
    with FakeTensorMode(), torch.device("cpu"), utils.set_default_dtype(dtype):
        codec = Autoencoder(shape)
        with tracker:
            if what == "encode":
                images = torch.empty(batch, shape.in_channels, height, width, dtype=torch.float32)
                codec.encode(images)
            else:
                cells = height // shape.downscale, width // shape.downscale
                codec.decode(torch.empty(batch, shape.z_channels, *cells))
    return tracker.peak
