"""Where a run writes: whether it can, and whether it is below the one folder that it locks."""

import os
from collections.abc import Iterator
from pathlib import Path

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import Problem
from torchtitan_flux.config.schema import get


def folder_problems(config: FluxJobConfig) -> Iterator[Problem]:
    """Folders that cannot be written, or that another run may be writing."""
    given, metrics = config.job.dump_folder, config.metrics
    if not given:
        yield Problem("job.dump_folder", "is no folder; name one")
        return
    if problem := _unwritable(Path(given)):
        yield Problem("job.dump_folder", problem)
        return
    if os.sep in config.comm.save_traces_file_prefix:
        yield Problem("comm.save_traces_file_prefix", "begins a file's name, so it has no /")
    saved = config.job.save_config_file
    for key, used in {
        "job.save_config_file": True,
        "checkpoint.folder": config.checkpoint.enable,
        "sampling.folder": config.sampling.enable,
        "metrics.save_tb_folder": metrics.enable_tensorboard or metrics.enable_wandb,
        "profiling.save_traces_folder": config.profiling.enable_profiling,
        "profiling.save_memory_snapshot_folder": config.profiling.enable_memory_snapshot,
        "comm.save_traces_folder": config.comm.trace_buf_size > 0,
    }.items():
        name, is_file = get(config, key), key == "job.save_config_file"
        if not name or not used:
            continue
        path = Path(os.path.normpath(Path(given) / name))
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
            problem = (
                "is not below job.dump_folder, the one folder that is kept from being written by "
                "two runs; name one in it"
            )
        elif is_file and path.is_dir():
            problem = f"{path} is a folder; name a file"
        elif not is_file and saved and path == Path(os.path.normpath(Path(given) / saved)):
            problem = "is the name of job.save_config_file; choose another"
        else:
            problem = _unwritable(path.parent if is_file else path)
        if problem:
            yield Problem(key, problem)


def _unwritable(folder: Path) -> str:
    """Why nothing can be put into a folder that may have to be made; "" where it can."""
    # unlike Path.exists, os.path.exists raises nothing
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        return f"{there} is a file; name a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} cannot be written by this user"
    return ""
