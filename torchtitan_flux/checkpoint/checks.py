"""Section [checkpoint]: what is saved, and what a run continues from."""

from collections.abc import Iterator
from pathlib import Path

from torchtitan_flux.checkpoint.manifest import Damaged, Manifest
from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import Problem, violated
from torchtitan_flux.paths import locate, why_absent

PARTS = ("model", "optimizer", "lr_scheduler", "dataloader", "train_state")
"""What a checkpoint consists of."""


def checkpoint_problems(config: FluxJobConfig) -> Iterator[Problem]:
    """Keys of [checkpoint] that a run could not follow."""
    c, key = config.checkpoint, "checkpoint."
    off = "nothing is loaded or saved: set checkpoint.enable = true, or remove the key"
    loads_or_saves = (
        "initial_load_path", "initial_load_in_hf", "last_save_in_hf", "exclude_from_loading",
    )  # fmt: skip
    yield from (
        Problem(key + name, off, ("checkpoint.enable",))
        for name in loads_or_saves
        if getattr(c, name) and not c.enable
    )
    path = c.initial_load_path if c.enable else None
    missing = path is not None and locate(path) is None
    yield from violated(
        (c.load_step != -1 and not c.enable, key + "load_step", off, "checkpoint.enable"),
        (
            c.create_seed_checkpoint and not c.enable,
            key + "create_seed_checkpoint",
            "needs checkpoint.enable = true",
            "checkpoint.enable",
        ),
        (
            c.create_seed_checkpoint and c.load_only,
            key + "create_seed_checkpoint",
            "saves, checkpoint.load_only = true does not",
            key + "load_only",
        ),
        (
            c.last_save_in_hf and c.load_only,
            key + "last_save_in_hf",
            "saves, checkpoint.load_only = true does not",
            key + "load_only",
        ),
        (
            c.enable and c.keep_latest_k == 1,
            key + "keep_latest_k",
            "keep at least 2, for the newest may turn out damaged; 0 keeps all",
        ),
        (missing, key + "initial_load_path", why_absent(path) if path and missing else ""),
        (
            c.initial_load_in_hf and not c.initial_load_path,
            key + "initial_load_in_hf",
            "needs checkpoint.initial_load_path: a diffusers folder, or a safetensors file "
            "(model.hf_assets_path is not read)",
        ),
        (
            c.initial_load_in_hf and not c.initial_load_model_only,
            key + "initial_load_in_hf",
            "such files hold weights alone; set checkpoint.initial_load_model_only = true",
            key + "initial_load_model_only",
        ),
        (
            c.last_save_in_hf and not c.last_save_model_only,
            key + "last_save_in_hf",
            "needs checkpoint.last_save_model_only = true; for a full last checkpoint, leave both "
            "false and run scripts/convert_checkpoint.py on it",
            key + "last_save_model_only",
        ),
    )
    yield from _exclusion_problems(config)
    folder = Path(config.job.dump_folder) / c.folder
    if c.enable and c.load_step >= 0 and not (folder / f"step-{c.load_step}").is_dir():
        there = sorted(int(p.name[5:]) for p in folder.glob("step-*") if p.name[5:].isdecimal())
        steps = f"are {', '.join(map(str, there))}" if there else "is none"
        message = f"{folder}/step-{c.load_step} does not exist; there {steps}"
        yield Problem("checkpoint.load_step", message)


def _exclusion_problems(config: FluxJobConfig) -> Iterator[Problem]:
    """Whether a run can continue without the parts that checkpoint.exclude_from_loading names."""
    c, key = config.checkpoint, "checkpoint.exclude_from_loading"
    parts = c.exclude_from_loading
    unknown = [part for part in dict.fromkeys(parts) if part not in PARTS]
    yield from violated(
        (unknown, key, f"no checkpoint has {', '.join(unknown)}; its parts are {', '.join(PARTS)}"),
        (
            "train_state" in parts,
            key,
            "without train_state, steps would be counted from 0 beside checkpoints of later ones; "
            "to begin anew from these weights, set another job.dump_folder and "
            "checkpoint.initial_load_path",
        ),
        (
            "model" in parts and c.initial_load_path and c.initial_load_model_only,
            key,
            "without model, nothing is left of checkpoint.initial_load_path while "
            "checkpoint.initial_load_model_only = true; remove one of them",
        ),
    )


def continuation_problem(path: Path) -> str:
    """Why no run can continue another's checkpoint, by its manifest and the sizes of its files.

    Empty where it can, as far as that shows.
    """
    try:
        manifest = Manifest.read(path)
        manifest.check_sizes(path)
    except Damaged as error:
        return why_not_continued(None, str(error))
    return why_not_continued(manifest, "")


def why_not_continued(manifest: Manifest | None, problem: str) -> str:
    """What to say of a checkpoint that is no full one; empty where it is.

    Args:
        manifest: None where the checkpoint is not good.
        problem: why.
    """
    remedy = "set checkpoint.initial_load_model_only = true to start from its weights"
    if manifest is None:
        return f"cannot be continued: {problem}; {remedy}"
    if manifest.kind != "full":
        return f"holds only a model, so it cannot be continued; {remedy}"
    return ""
