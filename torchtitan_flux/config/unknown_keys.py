"""Keys and sections that do not exist, with the nearest that do."""

import difflib
from collections.abc import Collection

from torchtitan_flux.config.problems import Problem

ELSEWHERE = {
    "training.seed": "debug.seed",
    "training.batch_size": "training.local_batch_size",
    "training.lr": "optimizer.lr",
    "training.learning_rate": "optimizer.lr",
    "optimizer.learning_rate": "optimizer.lr",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
    "training.compile": "compile.enable",
    "training.resolution": "training.img_size",
    "training.image_size": "training.img_size",
    "training.output_dir": "job.dump_folder",
    "training.mixed_precision": "training.mixed_precision_param",
    "training.guidance": "flow.guidance",
    "training.tensor_parallel_degree": "parallelism.tensor_parallel_degree",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_only",
    "validation.val_freq": "validation.freq",
}
"""Names that other trainers and earlier versions of torchtitan have."""


def unknown_key(name: str, keys: Collection[str], given: str) -> tuple[Problem, list[str]]:
    """What to say of a key that does not exist.

    Args:
        name: the dotted name that was given.
        keys: all that exist.
        given: how and where it was given.

    Returns:
        the problem, and the key that was probably meant (then its value is in doubt), if any.
    """
    near = nearest(name, keys)
    hint = f"did you mean {near[0]}?" if near else "./run_train.sh --help lists all keys"
    return Problem(name, f"is unknown; {hint}", given=given), near


def unknown_section(name: str, keys: Collection[str], given: str) -> Problem:
    """What to say of a section that does not exist."""
    sections = {key.rpartition(".")[0] for key in keys}
    near = difflib.get_close_matches(name, sections, n=1, cutoff=0.6)
    known = ", ".join(sorted(section for section in sections if "." not in section))
    hint = f"did you mean [{near[0]}]?" if near else f"the sections are {known}"
    return Problem(name, f"is an unknown section; {hint}", given=given)


def nearest(name: str, keys: Collection[str]) -> list[str]:
    """The key that `name` was probably meant to be: none or one.

    A slip of the finger within the section comes first, then the right key in a wrong section.
    """
    if name in ELSEWHERE:
        return [ELSEWHERE[name]]
    section, _, last = name.rpartition(".")
    within = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == section}
    if found := difflib.get_close_matches(last, within, n=1, cutoff=0.6):
        return [within[found[0]]]
    if found := difflib.get_close_matches(name, keys, n=1, cutoff=0.8):
        return found
    same = [key for key in keys if key.rpartition(".")[2] == last]
    if len(same) == 1:
        return same
    return difflib.get_close_matches(name, keys, n=1, cutoff=0.7)
