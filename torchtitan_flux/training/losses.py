"""From an encoded batch to each sample's loss: the one flow step."""

from jaxtyping import Float
from torch import Tensor, nn

from torchtitan_flux.flow_matching import Errors, interpolate, squared_errors
from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.model.inputs import FluxInputs, flux_inputs
from torchtitan_flux.parallel.parallelize import sync_gradients
from torchtitan_flux.parallel.pipeline import Pipeline
from torchtitan_flux.training.conditioning import EncodedBatch
from torchtitan_flux.training.transfer import sent


def flow_inputs(
    args: FluxModelArgs, encoded: EncodedBatch, t: Tensor, guidance: float | None
) -> tuple[FluxInputs, Float[Tensor, "b tokens features"]]:
    """The flow step before the model: its inputs at times t [b], and the velocity it is to give.

    `guidance` is the constant input of models that take one.
    """
    t = sent(t, encoded.latents.device)
    x_t, target = interpolate(encoded.latents, encoded.noise, t)
    return flux_inputs(x_t, t, encoded.text, args.geometry, encoded.size, guidance), target


def sample_losses(
    model: nn.Module, inputs: FluxInputs, target: Tensor, errors: Errors = squared_errors
) -> Float[Tensor, " b"]:
    """The flow step from the model on: summed squared velocity error of each sample.

    Args:
        model: FluxModel, sharded or not, or `Pipeline` (then without gradient).
        inputs, target: from `flow_inputs`.
        errors: `squared_errors`, or the same compiled.
    """
    return errors(model(*inputs), target)


def forward_backward(
    model: FluxModel | Pipeline,
    inputs: FluxInputs,
    target: Tensor,
    elements: int,
    last: bool,
    errors: Errors = squared_errors,
) -> Float[Tensor, " b"]:
    """The flow step and its gradients: loss of each sample over `elements`, detached.

    Args:
        model: what is trained; gradients are added to its parameters.
        inputs, target, errors: as of `sample_losses`.
        elements: of the global batch.
        last: whether no other microbatch adds to these gradients, and data ranks reduce them.
    """

    def losses(velocity: Tensor, target: Tensor) -> Tensor:
        return errors(velocity, target) / elements

    if isinstance(model, Pipeline):
        return model.forward_backward(inputs, target, losses, reduce=last)
    sync_gradients(model, last)
    found = sample_losses(model, inputs, target, losses)
    found.sum().backward()
    return found.detach()
