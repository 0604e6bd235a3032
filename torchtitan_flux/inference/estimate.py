"""What drawing will take of a device, before anything is loaded, and whether it fits.

The transformer's and the codec's work is measured by running them on fake tensors, where nothing
is allocated; weights are counted. Where encoders have not been downloaded, their sizes are
those of FLUX.1's own (planning/frozen.py).
"""

import functools
import json
from dataclasses import dataclass
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchtitan.tools import utils
from transformers import T5Config, T5EncoderModel

from torchtitan_flux.encoders.autoencoder import Autoencoder, AutoencoderArgs
from torchtitan_flux.inference.memory import text_of
from torchtitan_flux.inference.streaming import block_sizes
from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.model.inputs import TextConditioning
from torchtitan_flux.planning.dry_run import shown_of
from torchtitan_flux.planning.frozen import clip_parameters, configured_parts, t5_work
from torchtitan_flux.planning.timeline import blocks_of
from torchtitan_flux.planning.tracker import MemoryTracker
from torchtitan_flux.sampling.generate import SampleSettings, denoise

TOLERANCE = 0.15
"""How far the estimate may be from what is measured, as a share, besides `SLACK`."""
SLACK = 64 * 2**20
"""Bytes that libraries take for themselves: scratch memory of kernels, tokenizers."""


@dataclass(frozen=True)
class Phase:
    """Bytes of one stage: what is loaded, and the most that is worked with beside it."""

    name: str
    loaded: int
    work: int

    @property
    def peak(self) -> int:
        return self.loaded + self.work


@dataclass(frozen=True)
class Estimate:
    """What a rank takes of its device.

    Attributes:
        phases: in their order.
        assumed: parts that are not here, taken to be FLUX.1's.
    """

    phases: tuple[Phase, ...]
    assumed: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases)

    def table(self, title: str) -> str:
        """For people: a line for each phase, the dearest one marked by being the peak."""
        lines = [f"{title}: {text_of(self.peak)}"]
        lines += [
            f"  {phase.name:<20} {text_of(phase.peak):>10}   "
            f"(loaded {text_of(phase.loaded)}, worked with {text_of(phase.work)})"
            for phase in self.phases
        ]
        return "\n".join(lines)


def estimate(
    config: Any,
    args: FluxModelArgs,
    settings: SampleSettings,
    batch: int,
    ranks: int,
    low_memory: bool,
    dtype: torch.dtype,
    device_type: str,
    pictures: int = 1,
) -> Estimate:
    """By counting weights and running on fake tensors.

    Args:
        config: job configuration; its encoders need not be here.
        args: of the model.
        settings: of the pictures.
        batch: pictures that a rank draws at once.
        ranks: share the weights, unless `low_memory`.
        low_memory: one part after another, blocks streamed.
        dtype: of weights and computation.
        device_type: on a GPU, two blocks are on the device at a time.
        pictures: that go together from part to part with `low_memory`, in CPU memory in between.
    """
    parts = _parts(config, args, settings, dtype)
    t5, transformer = parts.t5, _transformer(args, dtype)
    # one step shows what many need
    alike = SampleSettings(
        settings.size,
        steps=1,
        cfg=1.0 if settings.cfg == 1.0 else 2.0,
        guidance=None if settings.guidance is None else 1.0,
    )
    drawing = _denoising(args, alike, batch, config.encoder.max_t5_encoding_len, dtype)
    if low_memory:
        slots = 1 if device_type == "cpu" else 2
        read = device_type == "cpu"  # a tensor on its way from the file
        tokens = config.encoder.max_t5_encoding_len
        caption = (tokens * args.context_in_dim + args.vec_in_dim) * dtype.itemsize
        held = pictures * caption if read else 0
        encoding = parts.encoding + 2 * held  # once more while they are put together
        return Estimate(
            (
                Phase("text encoders", t5.streamed(slots, read) + parts.clip, encoding),
                Phase("transformer", transformer.streamed(slots, read), drawing + held),
                Phase("codec", parts.codec, parts.decoding),
            ),
            parts.assumed,
        )
    loaded = parts.clip + parts.codec + t5.shared(ranks) + transformer.shared(ranks)
    ahead = 1 if device_type == "cpu" else 2  # the next block is gathered while one computes
    gathered = t5.gathered(ahead) if ranks > 1 else 0
    return Estimate(
        (
            Phase("text encoders", loaded, parts.encoding + gathered),
            # FSDP also copies what one rank has alone
            Phase("transformer", loaded, drawing + transformer.gathered(ahead)),
            Phase("codec", loaded, parts.decoding),
        ),
        parts.assumed,
    )


def refusal(
    wanted: Estimate, lower: Estimate | None, free: int, batch: int, settings: SampleSettings
) -> str | None:
    """Why drawing cannot work, with the sizes and what to change; None where it fits.

    Args:
        wanted: what will be done.
        lower: the same with --low_memory, where that was not asked for.
        free: bytes of the device.
        batch: pictures at once.
        settings: of the pictures.
    """
    if wanted.peak <= free:
        return None
    most = max(wanted.phases, key=lambda phase: phase.peak)
    return (
        f"it needs about {text_of(wanted.peak)}, and {text_of(free)} are free. The most goes to "
        f"the {most.name}: {text_of(most.loaded)} loaded, {text_of(most.work)} worked with. What "
        f"helps: {'; '.join(remedies(lower, free, batch, settings))}"
    )


def remedies(
    lower: Estimate | None, free: int | None, batch: int, settings: SampleSettings
) -> list[str]:
    """What makes drawing smaller.

    Args:
        lower: what it takes with --low_memory, where that was not asked for.
        free: bytes of the device, where known.
        batch: pictures at once.
        settings: of the pictures.
    """
    found = []
    if lower is not None:
        fits = ""
        if free is not None:
            fits = ", which fits" if lower.peak <= free else ", which does not fit either"
        found.append(f"--low_memory (about {text_of(lower.peak)}{fits})")
    if batch > 1:
        found.append(f"fewer at once: --inference.local_batch_size 1 (now {batch})")
    found.append(f"a smaller --size (now {settings.size})")
    return found


@dataclass(frozen=True)
class _Blocks:
    """A model of which blocks can be streamed. Bytes.

    Attributes:
        blocks: of each kind: bytes of one, how many.
        outside: all else.
        largest: of its tensors.
    """

    blocks: tuple[tuple[int, int], ...]
    outside: int
    largest: int

    @property
    def block(self) -> int:
        return max((size for size, count in self.blocks if count), default=0)

    def shared(self, ranks: int) -> int:
        return (self.outside + sum(size * count for size, count in self.blocks)) // ranks

    def gathered(self, blocks: int) -> int:
        """So many blocks, and all that is outside of them."""
        return blocks * self.block + self.outside

    def streamed(self, slots: int, read: bool) -> int:
        return self.outside + slots * self.block + (self.largest if read else 0)


def _transformer(args: FluxModelArgs, dtype: torch.dtype) -> _Blocks:
    with torch.device("meta"):
        model = FluxModel(shown_of(args))
    kinds = [(list(getattr(model, kind).values()), n) for kind, n in blocks_of(args).items()]
    return _streamable(model, [(blocks, n) for blocks, n in kinds if blocks], dtype)


def _streamable(
    model: nn.Module, kinds: list[tuple[list[nn.Module], int]], dtype: torch.dtype
) -> _Blocks:
    shown = sum(p.numel() for blocks, _ in kinds for b in blocks for p in b.parameters())
    total = sum(p.numel() for p in model.parameters())
    sizes = [(max(block_sizes(blocks, dtype)), count) for blocks, count in kinds]
    largest = max(p.numel() for p in model.parameters())
    return _Blocks(tuple(sizes), (total - shown) * dtype.itemsize, largest * dtype.itemsize)


@dataclass(frozen=True)
class _Parts:
    """Sizes of what stands around the transformer. Bytes."""

    t5: _Blocks
    clip: int
    codec: int
    encoding: int
    decoding: int
    assumed: tuple[str, ...]


def _parts(
    config: Any, args: FluxModelArgs, settings: SampleSettings, dtype: torch.dtype
) -> _Parts:
    t5, clip, codec, missing = configured_parts(config, args)
    codec_size = decoding = 0
    if codec is not None:
        codec_size, decoding = _codec(codec, settings.size.height, settings.size.width, dtype)
    return _Parts(
        _t5(t5.to_json_string(), dtype),
        clip_parameters(clip.to_json_string()) * dtype.itemsize,
        codec_size,
        t5_work(t5, 1, config.encoder.max_t5_encoding_len, dtype.itemsize),
        decoding,
        tuple("FLUX.1's autoencoder" if name == "autoencoder" else name for name in missing),
    )


@functools.lru_cache
def _t5(config: str, dtype: torch.dtype) -> _Blocks:
    with torch.device("meta"):
        model = T5EncoderModel(T5Config.from_dict(json.loads(config)))
    blocks = list(model.encoder.block)
    return _streamable(model, [(blocks, len(blocks))], dtype)


@functools.lru_cache
def _codec(shape: AutoencoderArgs, height: int, width: int, dtype: torch.dtype) -> tuple[int, int]:
    """(weights, most beside them while one picture is decoded)."""
    tracker = MemoryTracker()
    with FakeTensorMode(), torch.device("cpu"), utils.set_default_dtype(dtype):
        codec = Autoencoder(shape)
        weights = sum(p.numel() for p in codec.parameters()) * dtype.itemsize
        cells = height // shape.downscale, width // shape.downscale
        before = _noted(codec, tracker)
        with tracker:
            codec.decode(torch.empty(1, shape.z_channels, *cells, dtype=torch.float32))
    return weights, tracker.peak - before


def _noted(model: nn.Module, tracker: MemoryTracker) -> int:
    """Bytes of the weights; known to the tracker, which would take views of them for new."""
    for parameter in model.parameters():
        tracker.note(parameter)
    return tracker.alive


@functools.lru_cache
@torch.no_grad()
def _denoising(
    args: FluxModelArgs, settings: SampleSettings, batch: int, tokens: int, dtype: torch.dtype
) -> int:
    """Most bytes alive beside the weights; few blocks of a kind tell for all."""
    with torch.device("meta"):
        model = FluxModel(shown_of(args))
    tracker = MemoryTracker()
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=dtype), requires_grad=False
                )
        before = _noted(model, tracker)
        with tracker:
            noise = torch.empty(batch, *args.geometry.latent_shape(settings.size))
            text = TextConditioning(
                torch.empty(batch, tokens, args.context_in_dim, dtype=dtype),
                torch.empty(batch, args.vec_in_dim, dtype=dtype),
            )
            negative = None
            if settings.cfg != 1.0:
                negative = TextConditioning(
                    torch.empty(1, tokens, args.context_in_dim, dtype=dtype),
                    torch.empty(1, args.vec_in_dim, dtype=dtype),
                )
            denoise(model, args.geometry, noise, text, negative, settings)
    return tracker.peak - before
