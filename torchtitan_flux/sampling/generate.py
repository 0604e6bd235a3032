"""Prompts -> images with a model, text encoders and a codec."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from torchtitan_flux.encoders.codec import Codec
from torchtitan_flux.flow_matching import Velocity, standard_normal
from torchtitan_flux.latents import Geometry, ImageSize, pack, unpack
from torchtitan_flux.model.inputs import TextConditioning, conditioned_velocity
from torchtitan_flux.randomness import Stream, generator
from torchtitan_flux.sampling.euler import euler, guided
from torchtitan_flux.sampling.schedules import SCHNELL, Schedule

TextEncoding = Callable[[Sequence[str]], TextConditioning]
"""Captions -> conditioning; the empty caption is what classifier-free guidance leaves out."""


@dataclass(frozen=True)
class SampleSettings:
    """How pictures are drawn; written into each.

    Attributes:
        cfg: scale of classifier-free guidance; 1 switches it off.
        guidance: guidance input of a model with guidance embedding, else None.
        seed: noise of picture i is a function of (seed, i).
    """

    size: ImageSize
    steps: int
    cfg: float = 1.0
    guidance: float | None = None
    schedule: Schedule = SCHNELL
    seed: int = 0

    def times(self, geometry: Geometry) -> np.ndarray:
        """Of the steps, from 1 to 0. Raises ValueError where the schedule has none for them."""
        return self.schedule.times(self.steps, geometry.grid(self.size).tokens)

    def facts(self) -> dict[str, str]:
        """All of them by name, as a picture's file holds them."""
        return {name: str(value) for name, value in {**asdict(self), "size": self.size}.items()}


def initial_noise(geometry: Geometry, size: ImageSize, seed: int, index: int) -> Tensor:
    """Starting noise [c, h, w] of picture `index`, float32, the same on every machine."""
    return standard_normal(generator(seed, Stream.SAMPLE, index), geometry.latent_shape(size))


@torch.no_grad()
def generate(
    model: nn.Module,
    codec: Codec,
    encode_text: TextEncoding,
    geometry: Geometry,
    prompts: Sequence[str],
    indices: Sequence[int],
    settings: SampleSettings,
    negative_prompt: str = "",
    device: torch.device | str = "cpu",
) -> Float[Tensor, "b c H W"]:
    """Draw one `displayable` image for each prompt of a batch.

    Args:
        model: FluxModel, sharded or not; every rank that shares it must call with as many prompts.
        indices: number of each picture; it starts from noise (settings.seed, index).
        negative_prompt: what classifier-free guidance moves away from.
    """
    noise = torch.stack([initial_noise(geometry, settings.size, settings.seed, i) for i in indices])
    negative = encode_text([negative_prompt]) if settings.cfg != 1.0 else None
    text = encode_text(prompts)
    latents = denoise(model, geometry, noise.to(device), text, negative, settings)
    return displayable(codec.decode(latents))


@torch.no_grad()
def denoise(
    model: nn.Module,
    geometry: Geometry,
    noise: Float[Tensor, "b c h w"],
    text: TextConditioning,
    negative: TextConditioning | None,
    settings: SampleSettings,
    on_step: Callable[[Tensor], object] | None = None,
) -> Float[Tensor, "b c h w"]:
    """From noise to latents, float32, where the noise is.

    `negative` is the conditioning of one caption, needed where settings.cfg is not 1.
    """

    def velocity_of(conditioning: TextConditioning) -> Velocity:
        return conditioned_velocity(model, conditioning, geometry, settings.size, settings.guidance)

    velocity = velocity_of(text)
    if settings.cfg != 1.0:
        assert negative is not None, "guidance needs something to move away from"
        velocity = guided(velocity, velocity_of(negative.repeat(len(noise))), settings.cfg)
    tokens = euler(velocity, pack(noise, geometry.patch), settings.times(geometry), on_step)
    return unpack(tokens, geometry.grid(settings.size), geometry.patch)


def displayable(images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
    """What a codec decodes, in [-1, 1], float32; nan all over where a picture is not finite."""
    bad = ~images.isfinite().flatten(1).all(1)
    return images.float().clamp(-1, 1).masked_fill(bad.view(-1, 1, 1, 1), torch.nan)


def to_pil(image: Float[Tensor, "c H W"]) -> Image.Image:
    """An image in [-1, 1] with 1 or 3 channels as an 8-bit PIL image."""
    pixels = ((image.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    return Image.fromarray(pixels[0] if pixels.shape[0] == 1 else np.moveaxis(pixels, 0, -1))


def image_grid(images: Sequence[Image.Image], columns: int, enlarge_to: int = 48) -> Image.Image:
    """Images of one size side by side with a thin gap, small ones enlarged without smoothing."""
    width, height = images[0].size
    factor = max(1, -(-enlarge_to // min(width, height)))
    width, height = width * factor, height * factor
    gap, rows = 2, -(-len(images) // columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    sheet = Image.new(images[0].mode, size, "white")
    for i, image in enumerate(images):
        corner = ((i % columns) * (width + gap), (i // columns) * (height + gap))
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), corner)
    return sheet
