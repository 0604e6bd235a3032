"""A configuration as TOML: printed, and left in the dump folder to repeat the run with."""

import contextlib
import copy
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch.distributed as dist
from torchtitan.tools.logging import logger

from torchtitan_flux import __version__
from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.reference import as_toml
from torchtitan_flux.files import replacing
from torchtitan_flux.startup.model_args import AUTO, own_scheduler
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights


def resolved_toml(config: FluxJobConfig) -> str:
    """A configuration file that repeats the run.

    The schedule that the run's weights say (`own_scheduler`) is written out:
    `checkpoint.initial_load_path` may be gone one day.
    """
    resolved = copy.deepcopy(config)
    resolved.job.config_file = None  # it says where the other keys came from
    resolved.sampling.schedule = _stated_schedule(config) or config.sampling.schedule
    return (
        f"# The configuration as resolved by torchtitan-flux {__version__}.\n"
        "# Given as CONFIG_FILE it repeats the run (job.dump_folder names another place for it).\n"
        f"{as_toml(resolved)}"
    )


def _stated_schedule(config: FluxJobConfig) -> str:
    """The schedule that the weights say where the configuration leaves it to them."""
    with contextlib.suppress(UnreadableWeights):  # the check saw to it where it counts
        if config.sampling.schedule == AUTO and (stated := own_scheduler(config)):
            return str(stated.schedule())
    return ""


def log_resolved(config: FluxJobConfig) -> None:
    """Print and write the configuration, as job.print_config and job.save_config_file say.

    Called when ranks are joined and the seed is settled.
    """
    if config.job.print_config:
        logger.info(f"The configuration as resolved:\n{resolved_toml(config)}")
    if schedule := _stated_schedule(config):
        logger.info(f"sampling.schedule = {schedule!r}, as the run's weights say")
    name = config.job.save_config_file
    if not name or (dist.is_initialized() and dist.get_rank() != 0):
        return
    path = Path(config.job.dump_folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text(resolved_toml(config), encoding="utf-8")
