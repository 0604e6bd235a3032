"""What the frozen encoders and the codec need on one rank.

Sizes come from what is configured. Where it has not been downloaded yet they are those of the parts
that FLUX.1 was published with: T5-XXL v1.1 (config.json of google/t5-v1_1-xxl), CLIP-L/14
(text_config of openai/clip-vit-large-patch14), the autoencoder of Black Forest Labs' reference.
"""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchtitan.config import TORCH_DTYPE_MAP
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

T = TypeVar("T")

T5_XXL = T5Config(
    d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128,
    feed_forward_proj="gated-gelu",
)  # fmt: skip
CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    vocab_size=49408, max_position_embeddings=77,
)  # fmt: skip


@dataclass(frozen=True)
class Frozen:
    """Bytes on one rank.

    Attributes:
        t5, clip, autoencoder: weights, T5's of this rank's shard.
        encoding: most that is needed beside the weights while a batch is encoded.
        sampling: the same while samples are decoded; 0 where none are made.
    """

    t5: int
    clip: int
    autoencoder: int
    encoding: int = 0
    sampling: int = 0

    @property
    def weights(self) -> int:
        return self.t5 + self.clip + self.autoencoder


def frozen_parts(
    config: FluxJobConfig, args: FluxModelArgs, shard: int, work: bool = True
) -> Frozen:
    """Sizes of the configured encoders and codec, T5 sharded over `shard` ranks; `work`: also what
    is needed beside the weights."""
    encoder, sampling = config.encoder, config.sampling
    dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
    size = dtype.itemsize
    t5 = _configured(read_t5_config, encoder.t5_encoder, T5_XXL)
    clip = _configured(read_clip_config, encoder.clip_encoder, CLIP_L)
    codec = None
    if not args.pixel_space:
        codec = _configured(_codec_args, encoder.autoencoder_path, AutoencoderArgs())
    t5_all, t5_block = _t5_parameters(t5.to_json_string())
    encoding = decoding = codec_size = 0
    if work:
        # gathered: the embedding, a block, and the next one
        gathered = (t5.vocab_size * t5.d_model + 2 * t5_block) * size if shard > 1 else 0
        batch, tokens = config.training.local_batch_size, encoder.max_t5_encoding_len
        activations = batch * tokens * (2 * t5.d_model + 3 * t5.d_ff) * size
        scores = 3 * batch * t5.num_heads * tokens * tokens * 4  # float32, no flash attention
        encoding = gathered + max(activations, scores)
    if codec is not None:
        codec_size = size * sum(math.prod(shape) for shape in parameter_shapes(codec).values())
    if work and codec is not None:
        image, batch = config.training.image_size, config.training.local_batch_size
        encoding = max(encoding, _codec_work(codec, "encode", batch, image, dtype))
        if sampling.enable:
            decoding = _codec_work(codec, "decode", sampling.local_batch_size, image, dtype)
    return Frozen(
        t5=math.ceil(t5_all / shard) * size,
        clip=_clip_parameters(clip.to_json_string()) * size,
        autoencoder=codec_size,
        encoding=encoding,
        sampling=decoding,
    )


def _configured(read: Callable[[str], T], path: str, published: T) -> T:
    try:
        return read(resolved_path(path))
    except (OSError, ValueError):
        return published


def _codec_args(path: str) -> AutoencoderArgs:
    return StoredAutoencoder(Path(path)).args


@functools.lru_cache
def _t5_parameters(config: str) -> tuple[int, int]:
    """(all, in one block) of T5's encoder, by its configuration as JSON."""
    with torch.device("meta"):
        model = T5EncoderModel(T5Config.from_dict(json.loads(config)))
    block = sum(p.numel() for p in model.encoder.block[-1].parameters())
    return sum(p.numel() for p in model.parameters()), block


@functools.lru_cache
def _clip_parameters(config: str) -> int:
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig.from_dict(json.loads(config)))
    return sum(p.numel() for p in model.parameters())


@functools.lru_cache
def _codec_work(
    args: AutoencoderArgs, what: str, batch: int, image: ImageSize, dtype: torch.dtype
) -> int:
    """Most bytes alive beside the weights, on fake tensors."""
    tracker = MemoryTracker()
    with FakeTensorMode(), torch.device("cpu"), utils.set_default_dtype(dtype):
        codec = Autoencoder(args)
        with tracker:
            if what == "encode":
                shape = batch, args.in_channels, image.height, image.width
                codec.encode(torch.empty(shape, dtype=torch.float32))
            else:
                cells = image.height // args.downscale, image.width // args.downscale
                codec.decode(torch.empty(batch, args.z_channels, *cells))
    return tracker.peak
