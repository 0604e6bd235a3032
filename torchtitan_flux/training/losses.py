"""From a collated batch to each sample's loss: encode, then the one flow step."""

from torch import Tensor, nn

from torchtitan_flux.flow_matching import flow_step
from torchtitan_flux.generate import packed_velocity
from torchtitan_flux.latents import ImageSize, pack
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.training.conditioning import FrozenParts

Batch = dict[str, Tensor]


def sample_losses(
    model: nn.Module,
    parts: FrozenParts,
    args: FluxModelArgs,
    batch: Batch,
    t: Tensor,
    guidance: float | None,
) -> Tensor:
    """Summed squared velocity error of each sample [b]; training and validation share it.

    Args:
        model: FluxModel, sharded or not.
        parts: frozen encoders and codec.
        args: resolved model arguments.
        batch: collated samples (data/samples.py).
        t: time of each sample [b].
        guidance: constant guidance input, for models that take one.
    """
    height, width = batch["image"].shape[-2:]
    geometry = args.geometry
    latents = parts.encode_images(batch["image"], batch.get("posterior_noise"))
    text = parts.encode_tokens(batch["t5_tokens"], batch["clip_tokens"])
    return flow_step(
        packed_velocity(model, text, geometry, ImageSize(height, width), guidance),
        pack(latents, geometry.patch),
        pack(batch["noise"].to(parts.device), geometry.patch),
        t.to(parts.device),
    )
