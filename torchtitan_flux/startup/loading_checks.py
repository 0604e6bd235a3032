"""What a run goes on from: which of its checkpoints, and which parts of it."""

from pathlib import Path
from typing import Any

from torchtitan_flux.checkpoint.manifest import Damaged, Manifest
from torchtitan_flux.config.job_config import FluxJobConfig

PARTS = ("model", "optimizer", "lr_scheduler", "dataloader", "train_state")
"""What a checkpoint consists of."""


def loading_problems(config: FluxJobConfig) -> list[str]:
    """Keys of [checkpoint] about loading that a run could not follow."""
    found, c = [], config.checkpoint
    if c.create_seed_checkpoint and c.load_only:
        found.append(
            "checkpoint.create_seed_checkpoint = true saves, checkpoint.load_only = true does not"
        )
    if c.load_step != -1 and not c.enable:
        found.append(
            f"checkpoint.load_step = {c.load_step} is set, and nothing is loaded: set "
            "checkpoint.enable = true, or remove the key"
        )
    if c.load_step >= 0 and c.enable:
        folder = Path(config.job.dump_folder) / c.folder
        if not (folder / f"step-{c.load_step}").is_dir():
            there = sorted(int(p.name[5:]) for p in folder.glob("step-*") if p.name[5:].isdecimal())
            found.append(
                f"checkpoint.load_step = {c.load_step}: {folder}/step-{c.load_step} does not "
                f"exist; there {'are ' + ', '.join(map(str, there)) if there else 'is none'}"
            )
    return found + _left_out(c)


def going_on_problem(path: Path) -> str:
    """Why no run can go on with another's checkpoint, by its manifest and the sizes of its files.

    Empty where it can, as far as that shows.
    """
    try:
        manifest = Manifest.read(path)
        manifest.check_sizes(path)
    except Damaged as error:
        return why_not_gone_on(None, str(error))
    return why_not_gone_on(manifest, "")


def why_not_gone_on(manifest: Manifest | None, problem: str) -> str:
    """What to say of a checkpoint that is no full one; empty where it is.

    Args:
        manifest: None where the checkpoint is not good.
        problem: why.
    """
    if manifest is None:
        return (
            f"cannot be gone on with: {problem}; set checkpoint.initial_load_model_only = true "
            "where only its weights are wanted"
        )
    if manifest.kind != "full":
        return (
            "holds only a model, so it cannot be gone on with; set "
            "checkpoint.initial_load_model_only = true to start from its weights"
        )
    return ""


def _left_out(checkpoint: Any) -> list[str]:
    """Whether a run can go on without the parts that checkpoint.exclude_from_loading names."""
    key, parts = "checkpoint.exclude_from_loading", checkpoint.exclude_from_loading
    found = [
        f"{key} names {part!r}, which no checkpoint has; its parts are {', '.join(PARTS)}"
        for part in dict.fromkeys(parts)
        if part not in PARTS
    ]
    if "train_state" in parts:
        found.append(
            f"{key} names 'train_state': the steps would be counted from 0 beside checkpoints of "
            "later ones, from which the next start would go on; to begin anew from these weights, "
            "set another job.dump_folder and checkpoint.initial_load_path"
        )
    weights_alone = checkpoint.initial_load_path and checkpoint.initial_load_model_only
    if "model" in parts and weights_alone:
        found.append(
            f"{key} names 'model', and checkpoint.initial_load_path has nothing else to give while "
            "checkpoint.initial_load_model_only = true; remove one of them"
        )
    return found
