"""Whether a run can begin with the weights that checkpoint.initial_load_path names."""

from collections.abc import Iterator
from pathlib import Path

from torchtitan_flux.checkpoint.checks import continuation_problem
from torchtitan_flux.checkpoint.folder import complete_steps
from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import Problem
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.paths import locate
from torchtitan_flux.weights.locations import find
from torchtitan_flux.weights.open import open_weights

KEY = "checkpoint.initial_load_path"


def initial_weights_problems(
    config: FluxJobConfig, args: FluxModelArgs | None
) -> Iterator[Problem]:
    """Why a run cannot begin with what it is to begin with, by sizes and headers.

    Args:
        config: the configuration.
        args: the model; None where it is not known, then only the kind of the files is looked at.
    """
    c = config.checkpoint
    if not (c.enable and c.initial_load_path):
        return
    path = locate(c.initial_load_path)
    if path is None or complete_steps(Path(config.job.dump_folder) / c.folder):
        return  # missing, or the run continues from its own checkpoints
    if not c.initial_load_model_only:
        if not c.initial_load_in_hf and (why := continuation_problem(path)):
            yield Problem(KEY, why)
        return
    try:
        find(path, "sizes")
        if args is not None:
            guidance, unknown = c.guidance_weights, c.unknown_weights
            open_weights(path, args, guidance, unknown=unknown, contents=False)
    except (ValueError, OSError) as error:
        yield Problem(KEY, str(error))
