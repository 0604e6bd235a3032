"""What a run is: its seed, global batch and widths, agreed by all ranks, kept when continued."""

import copy
from pathlib import Path
from typing import Any

import torchtitan_flux.engine  # noqa: F401  (before torchtitan)

import torch
from torchtitan.tools.logging import logger

from torchtitan_flux.checkpoint.run_facts import RunFacts, read_run_facts, step_to_load
from torchtitan_flux.config.manager import ConfigError
from torchtitan_flux.config.resolve import resolve_model_args
from torchtitan_flux.randomness import draw_seed
from torchtitan_flux.training.data import global_batch_size


def settle(job_config: Any) -> tuple[Any, RunFacts]:
    """The configuration with its seed settled, and what the run is tied to.

    The newest checkpoint decides: its seed is kept. Without one, an unset seed is drawn on rank 0
    and told to the others.

    Raises:
        ConfigError: naming the key that differs from the run that is to be continued.
    """
    folder = Path(job_config.job.dump_folder) / job_config.checkpoint.folder
    # Rank 0 reads and all ranks hear the same, also where a file system lags behind on some node.
    box: list[Any] = [_stored_facts(folder, job_config) if _rank() == 0 else None]
    torch.distributed.broadcast_object_list(box, src=0)
    stored = box[0]
    if isinstance(stored, str):
        raise ConfigError([stored])
    seed = job_config.debug.seed
    if isinstance(stored, RunFacts):
        if seed is not None and seed != stored.seed:
            raise ConfigError(
                [
                    f"debug.seed = {seed}, but the run in {folder} was started with {stored.seed}; "
                    "remove the key to continue it, or set another job.dump_folder"
                ]
            )
        seed = stored.seed
    elif seed is None:
        seed = stored  # drawn on rank 0
        logger.info(f"debug.seed was not set; this run's seed is {seed}")
    config = copy.deepcopy(job_config)
    config.debug.seed = seed

    args = resolve_model_args(config)
    facts = RunFacts(
        seed=seed,
        global_batch_size=global_batch_size(config, _data_degree(config)),
        context_in_dim=args.context_in_dim,
        vec_in_dim=args.vec_in_dim,
        in_channels=args.in_channels,
    )
    if isinstance(stored, RunFacts):
        _check_same_run(facts, stored, folder, config)
    return config, facts


def _data_degree(config: Any) -> int:
    """Ranks that read different samples, before there is a mesh to ask."""
    p = config.parallelism
    peers = p.context_parallel_degree * p.tensor_parallel_degree * p.pipeline_parallel_degree
    return torch.distributed.get_world_size() // peers


def _rank() -> int:
    return torch.distributed.get_rank()


def _stored_facts(folder: Path, job_config: Any) -> RunFacts | int | str:
    """Facts of the newest checkpoint, a fresh seed where there is none, or what is wrong."""
    step = step_to_load(folder, job_config.checkpoint.load_step)
    if step is None or not job_config.checkpoint.enable:
        return draw_seed()
    try:
        stored = read_run_facts(folder / f"step-{step}")
    except (ValueError, OSError) as error:
        return str(error)
    if stored is not None:
        return stored
    return (
        f"{folder}/step-{step} holds only a model (checkpoint.last_save_model_only = true), so "
        "this run is finished; set another job.dump_folder, or start a new run from it by "
        "checkpoint.initial_load_path"
    )


def _check_same_run(now: RunFacts, stored: RunFacts, folder: Path, config: Any) -> None:
    remedies = {
        "context_in_dim": "encoder.t5_encoder",
        "vec_in_dim": "encoder.clip_encoder",
        "in_channels": "encoder.autoencoder_path / encoder.pixel_channels",
        "randomness_version": "the version of torchtitan-flux",
    }
    if config.training.global_batch_size <= 0:
        remedies["global_batch_size"] = (
            "training.global_batch_size (set it to continue with another on purpose)"
        )
    found = [
        f"{name} is {getattr(now, name)}, but the run in {folder} was started with "
        f"{getattr(stored, name)}: see {key}"
        for name, key in remedies.items()
        if getattr(now, name) != getattr(stored, name)
    ]
    if found:
        raise ConfigError(found)
