"""Where a run writes: whether it can, and whether it is below the one folder that it locks."""

import os
from pathlib import Path

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.schema import get

USED_BY = {
    "job.save_config_file": lambda c: True,
    "checkpoint.folder": lambda c: c.checkpoint.enable,
    "sampling.folder": lambda c: c.sampling.enable,
    "metrics.save_tb_folder": lambda c: c.metrics.enable_tensorboard or c.metrics.enable_wandb,
    "profiling.save_traces_folder": lambda c: c.profiling.enable_profiling,
    "profiling.save_memory_snapshot_folder": lambda c: c.profiling.enable_memory_snapshot,
    "comm.save_traces_folder": lambda c: c.comm.trace_buf_size > 0,
}
"""Keys of names below job.dump_folder -> whether a run writes there."""


def folder_problems(config: FluxJobConfig) -> list[str]:
    """Folders that cannot be written, or that another run may be writing."""
    given = config.job.dump_folder
    if not given:
        return ['job.dump_folder = "" is no folder; name one']
    if problem := _unwritable(Path(given)):
        return [f"job.dump_folder = {given!r}: {problem}"]
    found = []
    prefix = config.comm.save_traces_file_prefix
    if os.sep in prefix:
        found.append(f"comm.save_traces_file_prefix = {prefix!r}: it begins a file's name, so no /")
    kept = config.job.save_config_file
    for key, used in USED_BY.items():
        name = get(config, key)
        if not name or not used(config):
            continue
        path = Path(os.path.normpath(Path(given) / name))
        is_file = key == "job.save_config_file"
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
            found.append(
                f"{key} = {name!r} is not below job.dump_folder, the one folder that is kept from "
                "being written by two runs; name one in it"
            )
        elif is_file and path.is_dir():
            found.append(f"{key} = {name!r}: {path} is a folder; name a file")
        elif not is_file and kept and path == Path(os.path.normpath(Path(given) / kept)):
            found.append(f"{key} = {name!r} is the name of job.save_config_file; choose another")
        elif problem := _unwritable(path.parent if is_file else path):
            found.append(f"{key} = {name!r}: {problem}")
    return found


def _unwritable(folder: Path) -> str:
    """Why nothing can be put into a folder that may have to be made; "" where it can."""
    # unlike Path.exists, os.path.exists raises nothing
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        return f"{there} is a file; name a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} cannot be written by this user"
    return ""
