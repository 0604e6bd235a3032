"""What a run is: its seed, global batch and widths, agreed by all ranks, kept when continued."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch.distributed as dist
from torchtitan.tools.logging import logger

from torchtitan_flux.checkpoint.checks import why_not_continued
from torchtitan_flux.checkpoint.folder import (
    Choice,
    abandon_after,
    agree,
    choose_checkpoint,
    clear_leftovers,
    list_steps,
    rename_over,
    step_folder,
    verify,
)
from torchtitan_flux.checkpoint.manifest import Manifest
from torchtitan_flux.checkpoint.run_facts import RunFacts, Settings
from torchtitan_flux.config.job_config import Checkpoint, FluxJobConfig
from torchtitan_flux.config.schema import get, keys_of
from torchtitan_flux.config.values import toml_text
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.parallel.mesh_checks import peer_degree
from torchtitan_flux.paths import resolved_path
from torchtitan_flux.randomness import draw_seed
from torchtitan_flux.startup.load_config import ConfigError
from torchtitan_flux.startup.model_args import resolve_model_args
from torchtitan_flux.training.data import global_batch_size
from torchtitan_flux.training.run_folder import RunFolderLock, lock_run_folder
from torchtitan_flux.weights.load import open_for
from torchtitan_flux.weights.open import Weights
from torchtitan_flux.weights.pruned import blocks_told

T = TypeVar("T")

MAY_CHANGE = ("training", "optimizer", "lr_scheduler", "flow")
"""Sections of the configuration that decide how a run trains, and hold for the steps to come."""


@dataclass(frozen=True)
class ResumePlan:
    """What is known before anything is built.

    Attributes:
        config: the configuration with its seed.
        facts: what the run is tied to.
        settings: what may change when it is resumed.
        choice: the run's own checkpoint that it continues from; empty when it begins.
        initial: the weights that it begins with, or the folder of another run's checkpoint that it
            resumes from, or None.
        lock: keeps other runs out of the dump folder; rank 0 holds it.
    """

    config: FluxJobConfig
    facts: RunFacts
    settings: Settings
    choice: Choice
    initial: Weights | Path | None
    lock: RunFolderLock | None

    @property
    def finished(self) -> bool:
        """Whether the last step was done before."""
        manifest = self.choice.manifest
        return manifest is not None and manifest.step >= self.config.training.steps


def plan_resume(job_config: FluxJobConfig) -> ResumePlan:
    """Find the checkpoint to continue from, and what the run is tied to; collective.

    A checkpoint decides: its seed is kept. Without one, an unset seed is drawn on rank 0 and told
    to the others.

    Raises:
        ConfigError: naming the key that differs from the run that is to be continued, the
            checkpoints that are damaged, or why the weights to begin with are not this model's.
    """
    lock = _lock(job_config.job.dump_folder)
    folder = checkpoint_folder(job_config)
    args = resolve_model_args(job_config)
    choice, initial, manifest = Choice(), None, None
    if job_config.checkpoint.enable:
        choice = _choose(folder, job_config.checkpoint)
        manifest = choice.manifest
        if manifest is None:
            initial, manifest = _initial(job_config, args)
        elif job_config.checkpoint.initial_load_path:
            logger.info(
                f"checkpoint.initial_load_path is not read: the run continues from {choice.folder}"
            )
    _check_can_resume(choice, job_config)

    continued = initial if isinstance(initial, Path) else folder
    begins = choice.folder or (initial.path if isinstance(initial, Weights) else initial)
    note = begins and blocks_told(begins, job_config.model.flavor, args)
    if note:
        logger.warning(note)
    seed = _resolve_seed(job_config.debug.seed, manifest, continued)
    config = copy.deepcopy(job_config)
    config.debug.seed = seed
    facts = RunFacts(
        seed=seed,
        global_batch_size=global_batch_size(config, _data_degree(config)),
        context_in_dim=args.context_in_dim,
        vec_in_dim=args.vec_in_dim,
        in_channels=args.in_channels,
        depth=args.depth,
        depth_single_blocks=args.depth_single_blocks,
    )
    settings = settings_of(config)
    if manifest is not None:
        _check_same_run(facts, manifest, continued, config)
        changed = differences(manifest.settings, settings)
        if changed and manifest.kind == "full" and manifest.step < config.training.steps:
            logger.info(f"From step {manifest.step + 1} on: {', '.join(changed)}")
    return ResumePlan(config, facts, settings, choice, initial, lock)


def settings_of(config: FluxJobConfig) -> Settings:
    """What is stored with a checkpoint of how the run trains."""
    keys = (key.name for key in keys_of(type(config)) if key.section in MAY_CHANGE)
    return {name: toml_text(get(config, name)) for name in keys}


def differences(before: Settings, now: Settings) -> list[str]:
    """The keys with another value than before: "optimizer.lr 0.0001 -> 5e-05"."""
    return [
        f"{key} {before[key]} -> {value}"
        for key, value in now.items()
        if before.get(key, value) != value
    ]


def checkpoint_folder(config: FluxJobConfig) -> Path:
    """Where the checkpoints of a run lie."""
    return Path(config.job.dump_folder) / config.checkpoint.folder


def _lock(folder: str) -> RunFolderLock | None:
    """Take the dump folder on rank 0; every rank hears when another run has it."""
    lock, problem = None, ""
    if dist.get_rank() == 0:
        try:
            lock = lock_run_folder(folder)
        except ConfigError as error:
            problem = error.found[0]
        except OSError as error:
            problem = f"job.dump_folder = {folder!r} cannot be written: {error}"
    box = [problem]
    dist.broadcast_object_list(box, src=0)
    if box[0]:
        raise ConfigError(box)
    return lock


def _choose(folder: Path, checkpoint: Checkpoint) -> Choice:
    """The checkpoint to continue from; what is damaged is named, and decides nothing silently."""
    for line in agree(lambda: clear_leftovers(folder)):
        logger.info(line)
    choice = choose_checkpoint(folder, checkpoint.load_step)
    listed = [f"{step_folder(folder, s)} is damaged: {why}" for s, why in choice.damaged.items()]
    if choice.folder is not None:
        for line in listed:
            logger.warning(f"{line}; continuing from {choice.folder.name}")
        if checkpoint.load_step != -1:
            for path in agree(lambda: abandon_after(folder, checkpoint.load_step)):
                logger.warning(f"Going back to {choice.folder.name}: {path.stem} is now {path}")
        return choice
    if checkpoint.load_step != -1:
        raise ConfigError([f"checkpoint.load_step = {checkpoint.load_step}: {listed[0]}"])
    if not listed:
        return choice
    if not checkpoint.start_over_when_damaged:
        remedy = (
            "no good checkpoint is left; set another job.dump_folder, or "
            "checkpoint.start_over_when_damaged = true to begin again at step 0 (damaged ones are "
            "then set aside)"
        )
        raise ConfigError([*listed, remedy])
    steps = list_steps(folder)
    for path in agree(lambda: [rename_over(step_folder(folder, s), "damaged") for s in steps]):
        logger.warning(f"{path.stem} is damaged and was set aside as {path}")
    return Choice()


def _initial(
    config: FluxJobConfig, args: FluxModelArgs
) -> tuple[Weights | Path | None, Manifest | None]:
    """What `checkpoint.initial_load_path` names, and its manifest where the run resumes from it."""
    checkpoint = config.checkpoint
    if not checkpoint.initial_load_path:
        return None, None
    key = f"checkpoint.initial_load_path = {checkpoint.initial_load_path!r}"
    path = Path(resolved_path(checkpoint.initial_load_path))
    if missing := [rank for rank, there in enumerate(_all_gather(path.exists())) if not there]:
        raise ConfigError([f"{key} does not exist on rank {', '.join(map(str, missing))}"])
    if checkpoint.initial_load_model_only:
        return _weights(path, config, args, key), None
    manifest, problem = verify(path)
    if why := why_not_continued(manifest, problem):
        raise ConfigError([f"{key} {why}"])
    return path, manifest


def _weights(path: Path, config: FluxJobConfig, args: FluxModelArgs, key: str) -> Weights:
    """The weights at `path`, checked on every rank against the model that will be built."""
    weights, problem, c = None, "", config.checkpoint
    try:
        weights = open_for(path, config.model.flavor, args, c.guidance_weights, c.unknown_weights)
    except (ValueError, OSError) as error:
        problem = str(error)
    if found := sorted(set(filter(None, _all_gather(problem)))):
        raise ConfigError([f"{key}: {problem}" for problem in found])
    assert weights is not None
    logger.info(f"Beginning with the weights of {weights.path} ({weights.format})")
    return weights


def _all_gather(value: T) -> list[T]:
    """The value of every rank."""
    gathered = [value] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _check_can_resume(choice: Choice, config: FluxJobConfig) -> None:
    """A model without its optimizer is the end of a run, or (step 0) its beginning."""
    manifest = choice.manifest
    if manifest is None or manifest.kind == "full" or manifest.step == 0:
        return
    if manifest.step < config.training.steps:
        raise ConfigError(
            [
                f"{choice.folder} holds only a model (checkpoint.last_save_model_only = true), so "
                f"training.steps = {config.training.steps} cannot be resumed from it; set "
                "checkpoint.load_step to an earlier step, or another job.dump_folder and start "
                "from these weights by checkpoint.initial_load_path"
            ]
        )


def _resolve_seed(given: int | None, manifest: Manifest | None, folder: Path) -> int:
    if manifest is not None:
        stored = manifest.facts.seed
        if given is not None and given != stored:
            raise ConfigError(
                [
                    f"debug.seed = {given}, but the run in {folder} was started with {stored}; "
                    "remove the key to continue it, or set another job.dump_folder"
                ]
            )
        return stored
    if given is not None:
        return given
    box = [draw_seed() if dist.get_rank() == 0 else 0]
    dist.broadcast_object_list(box, src=0)
    logger.info(f"debug.seed was not set; this run's seed is {box[0]}")
    return box[0]


def _data_degree(config: FluxJobConfig) -> int:
    """Ranks that read different samples, before there is a mesh to ask."""
    return dist.get_world_size() // peer_degree(config.parallelism)


def _check_same_run(now: RunFacts, manifest: Manifest, folder: Path, config: FluxJobConfig) -> None:
    stored = manifest.facts
    remedies = {
        "context_in_dim": "encoder.t5_encoder",
        "vec_in_dim": "encoder.clip_encoder",
        "in_channels": "encoder.autoencoder_path / encoder.pixel_channels",
        "depth": "model.flavor",
        "depth_single_blocks": "model.flavor",
        "randomness_version": "the version of torchtitan-flux",
    }
    # a seed checkpoint, of step 0, was made before there were batches
    if config.training.global_batch_size <= 0 and manifest.step > 0:
        remedies["global_batch_size"] = (
            "training.global_batch_size (set it to continue with another on purpose)"
        )
    found = [
        f"{name} is {getattr(now, name)}, but the run in {folder} was started with "
        f"{getattr(stored, name)}: see {key}"
        for name, key in remedies.items()
        if getattr(stored, name) not in (None, getattr(now, name))
    ]
    if found:
        raise ConfigError(found)
