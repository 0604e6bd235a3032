"""What FluxModel is called with, in one place."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from torchtitan_flux.flow_matching import Velocity
from torchtitan_flux.latents import Geometry, ImageSize, image_ids, text_ids


@dataclass(frozen=True)
class TextConditioning:
    """Encoded captions: `txt` [b, tokens, context] and pooled `vec` [b, width]."""

    txt: Float[Tensor, "*b tokens context"]
    vec: Float[Tensor, "*b width"]

    def repeat(self, count: int) -> "TextConditioning":
        """The conditioning of one caption, for `count` samples."""
        return TextConditioning(self.txt.expand(count, -1, -1), self.vec.expand(count, -1))

    def to(self, device: torch.device | str) -> "TextConditioning":
        return TextConditioning(self.txt.to(device), self.vec.to(device))


class FluxInputs(NamedTuple):
    """Arguments of `FluxModel.forward`, by its names and in its order: `model(*inputs)`.

    `img` and `txt` are tokens [b, n, features], `*_ids` their positions [b, n, axes], `timesteps`
    and `guidance` [b] (`guidance` exactly where the model has a guidance embedding), `y` the pooled
    text [b, width].
    """

    img: Float[Tensor, "b img in_channels"]
    img_ids: Num[Tensor, "b img axes"]
    txt: Float[Tensor, "b txt context"]
    txt_ids: Num[Tensor, "b txt axes"]
    timesteps: Num[Tensor, " b"]
    y: Float[Tensor, "b vec"]
    guidance: Num[Tensor, " b"] | None = None

    def padded_to(self, b: int) -> "FluxInputs":
        """b samples: these, and repeats of the last."""
        index = torch.arange(b, device=self.img.device).clamp(max=self.img.shape[0] - 1)
        return FluxInputs(*(None if x is None else x[index] for x in self))  # type: ignore[arg-type]


def flux_inputs(
    x: Float[Tensor, "b tokens features"],
    t: Float[Tensor, " b"],
    text: TextConditioning,
    geometry: Geometry,
    size: ImageSize,
    guidance: float | None,
) -> FluxInputs:
    """Inputs for noisy packed tokens x of images of `size` at times t (0 = data, 1 = noise).

    `guidance` is that of every sample; None for models without guidance embedding.
    """
    b = x.shape[0]
    return FluxInputs(
        img=x,
        img_ids=image_ids(geometry.grid(size), b, x.device),
        txt=text.txt,
        txt_ids=text_ids(text.txt.shape[1], b, x.device),
        timesteps=t,
        y=text.vec,
        guidance=None if guidance is None else torch.full_like(t, guidance),
    )


def conditioned_velocity(
    model: nn.Module,
    text: TextConditioning,
    geometry: Geometry,
    size: ImageSize,
    guidance: float | None,
) -> Velocity:
    """The model as a velocity of packed tokens and times alone; arguments as of `flux_inputs`."""
    return lambda x, t: model(*flux_inputs(x, t, text, geometry, size, guidance))
