"""From a collated batch to each sample's loss: encode, then the one flow step."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from torchtitan_flux.data.loader import Batch
from torchtitan_flux.flow_matching import flow_step, interpolate, squared_errors
from torchtitan_flux.latents import ImageSize, pack
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.parallel.pipeline import Pipeline
from torchtitan_flux.parallel.replicated_rows import ALONE, Peers
from torchtitan_flux.sampling.generate import TextConditioning, packed_arguments, packed_velocity
from torchtitan_flux.training.conditioning import FrozenParts
from torchtitan_flux.training.transfer import sent


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


def encode_batch(
    parts: FrozenParts, args: FluxModelArgs, batch: Batch, peers: Peers = ALONE
) -> EncodedBatch:
    """Run the frozen encoders and the codec on a collated batch (data/samples.py).

    Args:
        parts: encoders and codec.
        args: resolved model arguments.
        batch: the same on all `peers`, which encode a part each.
        peers: ranks that train on these samples together.
    """
    count = len(batch["image"])
    height, width = batch["image"].shape[-2:]
    patch = args.geometry.patch
    posterior = batch.get("posterior_noise")
    latents = parts.encode_images(
        peers.own(batch["image"]), None if posterior is None else peers.own(posterior)
    )
    text = parts.encode_tokens(peers.own(batch["t5_tokens"]), peers.own(batch["clip_tokens"]))
    return EncodedBatch(
        latents=pack(peers.join(latents, count), patch),
        noise=pack(sent(batch["noise"], parts.device), patch),
        text=TextConditioning(peers.join(text.txt, count), peers.join(text.vec, count)),
        size=ImageSize(height, width),
    )


def sample_losses(
    model: nn.Module,
    args: FluxModelArgs,
    encoded: EncodedBatch,
    t: Tensor,
    guidance: float | None,
    errors: Callable[[Tensor, Tensor], Tensor] = squared_errors,
) -> Tensor:
    """Summed squared velocity error of each sample [b]; training and validation share it.

    Args:
        model: FluxModel, sharded or not.
        args: resolved model arguments.
        encoded: from `encode_batch`.
        t: time of each sample [b].
        guidance: constant guidance input, for models that take one.
        errors: `squared_errors`, or the same compiled (parallel/compile.py).
    """
    return flow_step(
        packed_velocity(model, encoded.text, args.geometry, encoded.size, guidance),
        encoded.latents,
        encoded.noise,
        sent(t, encoded.latents.device),
        errors,
    )


def pipelined_losses(
    pipeline: Pipeline,
    args: FluxModelArgs,
    encoded: EncodedBatch,
    t: Tensor,
    guidance: float | None,
    elements: int,
    last: bool,
    errors: Callable[[Tensor, Tensor], Tensor] = squared_errors,
) -> Tensor:
    """The flow step forward and backward through a pipeline: losses over `elements`, [b].

    Args:
        pipeline: what it goes through; gradients are in its stages afterwards.
        args, encoded, t, guidance, errors: as of `sample_losses`.
        elements: of the global batch.
        last: whether no other batch adds to these gradients, and data ranks are to share them.
    """
    t = sent(t, encoded.latents.device)
    x_t, target = interpolate(encoded.latents, encoded.noise, t)
    arguments = packed_arguments(x_t, t, encoded.text, args.geometry, encoded.size, guidance)
    return pipeline.step(arguments, target, elements, reduce=last, errors=errors)
