"""What a picture of the digits says of itself."""

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan_flux.inference.picture_file import Recorded, Source
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.sampling.generate import SampleSettings

DRAWN = Recorded(
    prompt="a handwritten seven",
    negative_prompt="",
    settings=SampleSettings(ImageSize(8, 8), 4),
    index=0,
    batch=1,
    row=0,
    flavor="flux-digits",
    dtype="float32",
    text_tokens=16,
    pixel_channels=1,
    step="600",
    own=True,
    weights=Source("outputs/flux_digits/checkpoint/step-600", "00"),
    t5=Source("assets/tiny/t5", "01"),
    clip=Source("assets/tiny/clip", "02"),
    autoencoder=None,
)
