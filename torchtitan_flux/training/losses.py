"""From a collated batch to each sample's loss: encode, then the one flow step."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from torchtitan_flux.data.loader import Batch
from torchtitan_flux.flow_matching import flow_step
from torchtitan_flux.generate import TextConditioning, packed_velocity
from torchtitan_flux.latents import ImageSize, pack
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.training.conditioning import FrozenParts


@dataclass(frozen=True)
class EncodedBatch:
    """What the model is trained on, on its device.

    Attributes:
        latents, noise: packed tokens [b, tokens, features], float32.
        text: encoded captions.
        size: of the images, in pixels.
    """

    latents: Float[Tensor, "b tokens features"]
    noise: Float[Tensor, "b tokens features"]
    text: TextConditioning
    size: ImageSize


def encode_batch(parts: FrozenParts, args: FluxModelArgs, batch: Batch) -> EncodedBatch:
    """Run the frozen encoders and the codec on a collated batch (data/samples.py)."""
    height, width = batch["image"].shape[-2:]
    patch = args.geometry.patch
    latents = parts.encode_images(batch["image"], batch.get("posterior_noise"))
    return EncodedBatch(
        latents=pack(latents, patch),
        noise=pack(batch["noise"].to(parts.device, non_blocking=True), patch),
        text=parts.encode_tokens(batch["t5_tokens"], batch["clip_tokens"]),
        size=ImageSize(height, width),
    )


def sample_losses(
    model: nn.Module,
    args: FluxModelArgs,
    encoded: EncodedBatch,
    t: Tensor,
    guidance: float | None,
) -> Tensor:
    """Summed squared velocity error of each sample [b]; training and validation share it.

    Args:
        model: FluxModel, sharded or not.
        args: resolved model arguments.
        encoded: from `encode_batch`.
        t: time of each sample [b].
        guidance: constant guidance input, for models that take one.
    """
    return flow_step(
        packed_velocity(model, encoded.text, args.geometry, encoded.size, guidance),
        encoded.latents,
        encoded.noise,
        t.to(encoded.latents.device, non_blocking=True),
    )
