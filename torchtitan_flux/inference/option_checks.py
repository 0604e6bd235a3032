"""Options of run_infer.sh that do not exist or cannot be: what is meant, and what can."""

import argparse
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

MOST_PIXELS = 65_536
"""Of a side; beyond it no file format but PNG holds a picture, and no machine its attention."""


@dataclass(frozen=True)
class Range:
    """Numbers that an option takes, both ends included; in words."""

    least: int | float
    most: int | float
    words: str

    def holds(self, value: int | float) -> bool:
        # an int may be too large to be asked whether it is finite
        return self.least <= value <= self.most and value != math.inf


RANGES = {
    "steps": Range(1, 10_000, "at least 1, at most 10000"),
    "count": Range(1, 10_000, "at least 1, at most 10000"),
    "cfg": Range(0, math.inf, "a finite number, 0 or more; 1 is off"),
    "guidance": Range(0, math.inf, "a finite number, 0 or more"),
    "seed": Range(-1, math.inf, "0 or more, or -1 for a fresh one"),
}

NOT_EMPTY = ("out", "prompts", "weights", "from_png", "size")

_SIZE = "the size is given as --size HEIGHTxWIDTH, or one number for a square"
_COUNT = "--count N draws N pictures of each prompt"
_STEPS = "the number of steps is --steps"
_CFG = "the scale of classifier-free guidance is --cfg"
_OUT = "--out names a file or a folder"
_WEIGHTS = "other weights than the run's are given with --weights PATH"
_LOW = "--low_memory has one part after another on the card, block by block"
_DTYPE = "the type of weights and computation is --training.mixed_precision_param"
ELSEWHERE = {
    **dict.fromkeys(("height", "width", "resolution", "image_size", "img_size"), _SIZE),
    **dict.fromkeys(
        ("num_images", "num_images_per_prompt", "images_per_prompt", "num_samples", "n_samples"),
        _COUNT,
    ),
    "batch_size": f"{_COUNT}, --inference.local_batch_size N that many at once",
    **dict.fromkeys(("num_inference_steps", "num_steps", "denoising_steps"), _STEPS),
    "guidance_scale": "--guidance is flux-dev's guidance input, --cfg classifier-free guidance",
    **dict.fromkeys(("cfg_scale", "true_cfg_scale", "true_cfg"), _CFG),
    "negative_prompt": "it is given as --negative CAPTION",
    **dict.fromkeys(("output", "output_path", "output_dir", "outdir", "save_path"), _OUT),
    "format": "the suffix of --out says it",
    **dict.fromkeys(("model", "model_path", "ckpt", "checkpoint"), _WEIGHTS),
    "pretrained_model_name_or_path": _WEIGHTS,
    **dict.fromkeys(("lowvram", "medvram", "offload", "cpu_offload"), _LOW),
    "enable_model_cpu_offload": _LOW,
    **dict.fromkeys(("dtype", "precision", "fp16", "bf16"), _DTYPE),
    **dict.fromkeys(("sampler", "scheduler"), "the schedule is --sampling.schedule"),
    **dict.fromkeys(("force", "yes"), "--overwrite replaces pictures that are there"),
    **dict.fromkeys(("random_seed", "manual_seed", "noise_seed"), "it is --seed"),
    "config": "the configuration file is CONFIG_FILE, or --job.config_file",
}
"""Names that other programs have, with underscores -> what does that here."""


def wrong_options(options: argparse.Namespace) -> list[str]:
    """Values that can never be drawn with, a line each."""
    found = []
    for name in NOT_EMPTY:
        if getattr(options, name) == "":
            found.append(f"--{name.replace('_', '-')} is empty")
    for name, allowed in RANGES.items():
        value = getattr(options, name)
        if value is not None and not allowed.holds(value):
            found.append(f"--{name} {value}: {allowed.words}")
    if options.ema is not None and options.weights is not None:
        found.append(
            "--ema is of a run's own checkpoint; scripts/convert_checkpoint.py --ema makes weights "
            "of an average"
        )
    for caption in (*options.prompt, options.negative or ""):
        if any("\ud800" <= letter <= "\udfff" for letter in caption):  # as Python reads such bytes
            found.append(f"{caption!a} is not written in UTF-8")
    return found


def unknown_options(given: Iterable[str], known: Iterable[str]) -> list[str]:
    """Lines about options that do not exist.

    Args:
        given: what is left of the command line, with underscores; keys of the configuration have
            a dot.
        known: our own options, with their dashes.
    """
    names = {name.removeprefix("--").replace("-", "_"): name for name in known}
    found = []
    for name in given:
        if "." in name:
            continue
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
        hint = "./run_infer.sh --help lists all options"
        if name in ELSEWHERE:
            hint = ELSEWHERE[name]
        elif near:
            hint = f"did you mean {names[near[0]]}?"
        found.append(f"--{name} is unknown: {hint}")
    return found
