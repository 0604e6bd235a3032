"""A configuration as TOML: printed, and left in the dump folder to repeat the run with."""

from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch.distributed as dist
from torchtitan.tools.logging import logger

from torchtitan_flux import __version__
from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.schema import get, keys_of
from torchtitan_flux.config.values import toml_text
from torchtitan_flux.files import replacing
from torchtitan_flux.startup.model_args import AUTO, own_scheduler
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights

NOT_WRITTEN = ("job.config_file",)
"""It says where the other keys came from."""


def resolved_toml(config: FluxJobConfig) -> str:
    """Every key with its value; read again as configuration file it gives an equal configuration.

    Keys that are unset and unset by default are left out: TOML has no word for it. The schedule
    that the run's weights say (`own_scheduler`) is written out: `checkpoint.initial_load_path` may
    be gone one day.
    """
    written = _written_out(config)
    lines = [
        f"# The configuration as resolved by torchtitan-flux {__version__}.",
        "# Given as CONFIG_FILE it repeats the run (job.dump_folder names another place for it).",
    ]
    section = None
    for key in keys_of(type(config)):
        value = written.get(key.name, get(config, key.name))
        if key.name in NOT_WRITTEN or (value is None and key.default is None):
            continue
        if key.section != section:
            section = key.section
            lines += ["", f"[{section}]"]
        lines.append(f"{key.name.rpartition('.')[2]} = {toml_text(value)}")
    return "\n".join(lines) + "\n"


def _written_out(config: FluxJobConfig) -> dict[str, str]:
    """Values that are found outside of the configuration, by key."""
    if config.sampling.schedule != AUTO:
        return {}
    try:
        stated = own_scheduler(config)
        return {} if stated is None else {"sampling.schedule": str(stated.schedule())}
    except UnreadableWeights:  # nothing is drawn by it: the check saw to that
        return {}


def log_resolved(config: FluxJobConfig) -> None:
    """Print and write the configuration, as job.print_config and job.save_config_file say.

    Called when ranks are joined and the seed is settled.
    """
    if config.job.print_config:
        logger.info(f"The configuration as resolved:\n{resolved_toml(config)}")
    for key, value in _written_out(config).items():
        logger.info(f"{key} = {value!r}, as the run's weights say")
    name = config.job.save_config_file
    if not name or (dist.is_initialized() and dist.get_rank() != 0):
        return
    path = Path(config.job.dump_folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text(resolved_toml(config), encoding="utf-8")
