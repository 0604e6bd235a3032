"""What a run is: its seed, global batch and widths, agreed by all ranks, kept when resumed."""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch.distributed as dist
from torchtitan.tools.logging import logger

from torchtitan_flux.checkpoint.checks import why_not_continued
from torchtitan_flux.checkpoint.folder import (
    Choice,
    abandon_after,
    choose_checkpoint,
    clear_leftovers,
    list_steps,
    rename_over,
    step_folder,
    verify,
)
from torchtitan_flux.checkpoint.manifest import Manifest, RunFacts, Settings
from torchtitan_flux.collectives import from_rank_0, gather
from torchtitan_flux.config.job_config import Checkpoint, FluxJobConfig
from torchtitan_flux.config.problems import ConfigError
from torchtitan_flux.config.schema import get, keys_of
from torchtitan_flux.config.values import toml_text
from torchtitan_flux.formatting import listed
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.parallel.dims import peer_degree
from torchtitan_flux.paths import resolved_path
from torchtitan_flux.randomness import draw_seed
from torchtitan_flux.startup.model_args import resolve_model_args
from torchtitan_flux.training.data import global_batch_size
from torchtitan_flux.training.run_folder import RunFolderLock, lock_run_folder
from torchtitan_flux.weights.open import Weights, open_weights
from torchtitan_flux.weights.pruned import blocks_told

MAY_CHANGE = ("training", "optimizer", "lr_scheduler", "flow")
"""Sections of the configuration that decide how a run trains, and hold for the steps to come."""

_MUST_STAY = {
    "seed": "debug.seed (remove the key to keep the run's, or set another job.dump_folder)",
    "context_in_dim": "encoder.t5_encoder",
    "vec_in_dim": "encoder.clip_encoder",
    "in_channels": "encoder.autoencoder_path / encoder.pixel_channels",
    "depth": "model.flavor",
    "depth_single_blocks": "model.flavor",
    "randomness_version": "the version of torchtitan-flux",
    "global_batch_size": "training.global_batch_size (set it to continue with another on purpose)",
}
"""Fact that a checkpoint is tied to -> where it comes from."""


@dataclass(frozen=True)
class ResumePlan:
    """What is known before anything is built.

    Attributes:
        config: the configuration with its seed.
        model_args: resolved.
        settings: what may change when the run is resumed.
        choice: the run's own checkpoint that it continues from; empty when it begins.
        initial: the weights that it begins with, or the folder of another run's checkpoint that it
            resumes from, or None.
        lock: keeps other runs out of the dump folder; rank 0 holds it.
    """

    config: FluxJobConfig
    model_args: FluxModelArgs
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

    A checkpoint decides: its seed is kept. Without one, an unset seed is drawn on rank 0.

    Raises:
        ConfigError: naming the key that differs from the run that is to be continued, the
            checkpoints that are damaged, or why the weights to begin with are not this model's.
    """
    config = copy.deepcopy(job_config)
    lock = _lock(config.job.dump_folder)
    folder = checkpoint_folder(config)
    args = resolve_model_args(config)
    choice, initial, manifest = Choice(), None, None
    if config.checkpoint.enable:
        choice = _choose(folder, config.checkpoint)
        manifest = choice.manifest
        if manifest is None:
            initial, manifest = _initial(config, args)
        elif config.checkpoint.initial_load_path:
            logger.info(
                f"checkpoint.initial_load_path is not read: the run continues from {choice.folder}"
            )
    _check_can_resume(choice, config)
    begins = choice.folder or (initial.path if isinstance(initial, Weights) else initial)
    if begins and (note := blocks_told(begins, config.model.flavor, args)):
        logger.warning(note)
    if config.debug.seed is None and manifest is not None:
        config.debug.seed = manifest.facts.seed
    elif config.debug.seed is None:
        config.debug.seed = from_rank_0(draw_seed)
        logger.info(f"debug.seed was not set; this run's seed is {config.debug.seed}")
    # ranks that read different samples, before there is a mesh to ask
    data_ranks = dist.get_world_size() // peer_degree(config.parallelism)
    facts = RunFacts(
        seed=config.debug.seed,
        global_batch_size=global_batch_size(config, data_ranks),
        context_in_dim=args.context_in_dim,
        vec_in_dim=args.vec_in_dim,
        in_channels=args.in_channels,
        depth=args.depth,
        depth_single_blocks=args.depth_single_blocks,
    )
    keys = (key.name for key in keys_of(type(config)) if key.section in MAY_CHANGE)
    settings = {name: toml_text(get(config, name)) for name in keys}
    if manifest is not None:
        _check_same_run(facts, manifest, initial if isinstance(initial, Path) else folder, config)
        before = manifest.settings
        changed = [
            f"{key} {before[key]} -> {value}"
            for key, value in settings.items()
            if before.get(key, value) != value
        ]
        if changed and manifest.kind == "full" and manifest.step < config.training.steps:
            logger.info(f"From step {manifest.step + 1} on: {', '.join(changed)}")
    return ResumePlan(config, args, facts, settings, choice, initial, lock)


def checkpoint_folder(config: FluxJobConfig) -> Path:
    """Where the checkpoints of a run lie."""
    return Path(config.job.dump_folder) / config.checkpoint.folder


def _lock(folder: str) -> RunFolderLock | None:
    """Take the dump folder on rank 0; every rank hears when another run has it."""
    lock, problems = None, []
    if dist.get_rank() == 0:
        try:
            lock = lock_run_folder(folder)
        except ConfigError as error:
            problems = error.found
        except OSError as error:
            problems = [f"job.dump_folder = {folder!r} cannot be written: {error}"]
    if problems := from_rank_0(lambda: problems):
        raise ConfigError(problems)
    return lock


def _choose(folder: Path, checkpoint: Checkpoint) -> Choice:
    """The checkpoint to continue from; what is damaged is named, and decides nothing silently."""
    for line in from_rank_0(lambda: clear_leftovers(folder)):
        logger.info(line)
    load_step = checkpoint.load_step
    choice = choose_checkpoint(folder, load_step)
    damaged = [f"{step_folder(folder, s)} is damaged: {why}" for s, why in choice.damaged.items()]
    if choice.folder is not None:
        for line in damaged:
            logger.warning(f"{line}; continuing from {choice.folder.name}")
        if load_step != -1:
            for path in from_rank_0(lambda: abandon_after(folder, load_step)):
                logger.warning(f"Going back to {choice.folder.name}: {path.stem} is now {path}")
    elif load_step != -1:
        raise ConfigError([f"checkpoint.load_step = {load_step}: {damaged[0]}"])
    elif damaged:
        if not checkpoint.start_over_when_damaged:
            remedy = (
                "no good checkpoint is left; set another job.dump_folder, or "
                "checkpoint.start_over_when_damaged = true to begin again at step 0 (damaged ones "
                "are then set aside)"
            )
            raise ConfigError([*damaged, remedy])
        folders = [step_folder(folder, step) for step in list_steps(folder)]
        for path in from_rank_0(lambda: [rename_over(one, "damaged") for one in folders]):
            logger.warning(f"{path.stem} is damaged and was set aside as {path}")
        return Choice()
    return choice


def _initial(
    config: FluxJobConfig, args: FluxModelArgs
) -> tuple[Weights | Path | None, Manifest | None]:
    """What `checkpoint.initial_load_path` names, and its manifest where the run resumes from it."""
    checkpoint = config.checkpoint
    if not checkpoint.initial_load_path:
        return None, None
    key = f"checkpoint.initial_load_path = {checkpoint.initial_load_path!r}"
    path = Path(resolved_path(checkpoint.initial_load_path))
    if missing := [rank for rank, there in enumerate(gather(path.exists())) if not there]:
        raise ConfigError([f"{key} does not exist on rank {listed(missing)}"])
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
        weights = open_weights(path, args, c.guidance_weights, unknown=c.unknown_weights)
    except (ValueError, OSError) as error:
        problem = str(error)
    if found := sorted(set(filter(None, gather(problem)))):
        raise ConfigError([f"{key}: {problem}" for problem in found])
    assert weights is not None
    logger.info(f"Beginning with the weights of {weights.path} ({weights.format})")
    return weights


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


def _check_same_run(now: RunFacts, manifest: Manifest, folder: Path, config: FluxJobConfig) -> None:
    stored, facts = asdict(manifest.facts), asdict(now)
    # a seed checkpoint, of step 0, was made before there were batches
    if config.training.global_batch_size > 0 or manifest.step == 0:
        del stored["global_batch_size"]
    found = [
        f"{name} is {facts[name]}, but the run in {folder} was started with {value}: see "
        f"{_MUST_STAY[name]}"
        for name, value in stored.items()
        if value not in (None, facts[name])
    ]
    if found:
        raise ConfigError(found)
