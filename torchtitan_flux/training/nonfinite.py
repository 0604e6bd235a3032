"""A loss or gradient that is not finite: where it came from, and what becomes of the run."""

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torchtitan.tools.logging import logger

from torchtitan_flux.collectives import gather
from torchtitan_flux.config.job_config import Training
from torchtitan_flux.formatting import listed
from torchtitan_flux.training.step_flags import Step


class NonFinite(RuntimeError):
    """The loss or a gradient is not finite, and the run is not to go on."""


def report_nonfinite(step: Step, training: Training, skipped_in_a_row: int) -> None:
    """Report which samples of the step it came from, its optimizer step having been skipped.

    Collective, the same on every rank.

    Args:
        step: what this rank knows of it.
        training: section [training]: `nonfinite` and `max_nonfinite_steps`.
        skipped_in_a_row: such steps one after another, this one among them.

    Raises:
        NonFinite: where the run is to stop.
    """
    bad = step.positions[~torch.isfinite(step.losses).to(step.positions.device)].tolist()
    found = sorted({position for of_rank in gather(bad) for position in of_rank})
    if found:
        where = f"the loss is not finite at positions [{listed(found, 20)}]"
    else:
        where = "every loss is finite, the gradient is not"
    message = f"Step {step.number}: {where}; gradient norm {float(step.grad_norm)}"
    if training.nonfinite == "stop":
        raise NonFinite(
            f'{message}. The run stops, as training.nonfinite = "stop" says; the last checkpoint '
            "is intact"
        )
    if skipped_in_a_row >= training.max_nonfinite_steps:
        raise NonFinite(
            f"{message}. {skipped_in_a_row} steps in a row (training.max_nonfinite_steps) had to "
            "be skipped, so the run stops; the last checkpoint is intact"
        )
    logger.warning(f"{message}. This step is skipped: the weights stay as they were")
