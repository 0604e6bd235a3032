"""The options of run_infer.sh: what there is, what cannot be, and what is meant by others."""

import argparse
import difflib
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from torchtitan_flux.config.command_line import given_keys
from torchtitan_flux.config.problems import ConfigError
from torchtitan_flux.encoders.pretrained import PUBLISHED
from torchtitan_flux.image_file import FORMATS
from torchtitan_flux.inference.picture import NoPicture, Picture
from torchtitan_flux.paths import locate

EXAMPLES = """examples:
  ./run_infer.sh --prompt "a handwritten seven" --count 4 --seed 3 --out sevens.webp
  ./run_infer.sh --from-png seven.png --out again.png

Any --section.key value of the configuration may follow; docs/inference.md tells more."""

FRESH_SEED = -1
"""The --seed that asks for a new one."""

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "--prompt": ("caption; may be repeated", {"action": "append", "default": []}),
    "--prompts": ("file with one caption a line", {"metavar": "FILE"}),
    "--from-png": ("repeat a picture of ours, PNG, JPEG or WebP", {"metavar": "FILE"}),
    "--count": ("pictures of each prompt; the seed goes up by one", {"type": int, "default": 1}),
    "--weights": ("a file or folder instead of the run's checkpoint", {"metavar": "PATH"}),
    "--ema": ("average of the run's weights", {"metavar": "DECAY", "nargs": "?", "const": ""}),
    "--out": (f"file ({', '.join(FORMATS)}) or folder", {"metavar": "PATH"}),
    "--overwrite": ("replace pictures that are there", {"action": "store_true"}),
    "--size": ("pixels: HEIGHTxWIDTH or one number", {}),
    "--steps": ("Euler steps", {"type": int}),
    "--cfg": ("scale of classifier-free guidance, 1 is off", {"type": float}),
    "--guidance": ("guidance input of flux-dev", {"type": float}),
    "--negative": ("caption to move away from, with --cfg", {"metavar": "CAPTION"}),
    "--seed": ("of the noise; -1 draws a fresh one", {"type": int}),
    "--low_memory": ("blocks from CPU memory: same pictures, slower", {"action": "store_true"}),
}
"""Option -> its help, and other arguments of `add_argument`."""

RANGES = {
    "steps": (1, 10_000),
    "count": (1, 10_000),
    "cfg": (0, 10_000),
    "guidance": (0, 10_000),
    "seed": (FRESH_SEED, math.inf),
}
"""The least and the highest value of an option."""


def out_of_range(name: str, value: int | float | None) -> str | None:
    """What is wrong with the value of an option."""
    least, most = RANGES[name]
    if value is None or least <= value <= most:
        return None
    return f"at least {least}, at most {most}"


OF_OTHER_PROGRAMS = {
    "--size HEIGHTxWIDTH": "height width resolution image_size img_size",
    "--count N": "num_images num_images_per_prompt images_per_prompt num_samples n_samples",
    "--inference.local_batch_size N": "batch_size",
    "--steps": "num_inference_steps num_steps denoising_steps",
    "--guidance (flux-dev's input) or --cfg (classifier-free guidance)": "guidance_scale",
    "--cfg": "cfg_scale true_cfg_scale true_cfg",
    "--negative CAPTION": "negative_prompt",
    "--out, a folder or a file whose suffix is the format": "output output_path output_dir outdir "
    "save_path format",
    "--weights PATH": "model model_path ckpt checkpoint pretrained_model_name_or_path",
    "--low_memory": "lowvram medvram offload cpu_offload enable_model_cpu_offload",
    "--training.mixed_precision_param": "dtype precision fp16 bf16",
    "--sampling.schedule": "sampler scheduler",
    "--overwrite": "force yes",
    "--seed": "random_seed manual_seed noise_seed",
    "CONFIG_FILE, or --job.config_file": "config",
}
"""What does here what other programs have options for, by their names with underscores."""

PIPELINE_FOLDERS = {
    **{key.removeprefix("encoder."): folder for key, (folder, _) in PUBLISHED.items()},
    "autoencoder_path": "vae",
}
"""Keys of [encoder] and where a diffusers pipeline folder keeps them."""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the rest: `--section.key value` of the configuration.

    The options have two more attributes: `given`, the keys of the rest, and `recorded`, the
    settings of the picture that --from-png names. A pipeline folder as --weights brings its
    encoders and autoencoder: the rest then names them.

    Raises:
        ConfigError: with all that is wrong: options that do not exist or cannot be, a picture that
            cannot be repeated.
    """
    parser = argparse.ArgumentParser(
        prog="run_infer.sh",
        description="Draw pictures with a trained model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, (meaning, more) in OPTIONS.items():
        parser.add_argument(*sorted({name, name.replace("_", "-")}), help=meaning, **more)
    options, rest = parser.parse_known_args(argv)
    options.given = {key for key, _ in given_keys(rest)}
    options.recorded = None
    problems = _invalid(options)
    problems += [_unknown(name) for name in sorted(options.given) if "." not in name]
    if options.from_png is not None and not problems:
        try:
            options.recorded = Picture.read(Path(options.from_png))
        except NoPicture as error:
            problems.append(f"--from-png: {error}")
    if problems:
        raise ConfigError(problems)
    return options, rest if options.weights is None else with_pipeline_of(options.weights, rest)


def with_pipeline_of(weights: str, rest: list[str]) -> list[str]:
    """`rest`, naming also the encoders and autoencoder in the pipeline folder `weights`.

    They outrank the configuration file, as they belong to the weights, and not what `rest` names.
    """
    root = locate(weights)
    if root is None or not (root / "model_index.json").is_file():
        return rest
    given = {key for key, _ in given_keys(rest)}
    return rest + [
        word
        for key, folder in PIPELINE_FOLDERS.items()
        if (root / folder).is_dir() and f"encoder.{key}" not in given
        for word in (f"--encoder.{key}", str(root / folder))
    ]


def _invalid(options: argparse.Namespace) -> list[str]:
    """Values that can never be drawn with, a line each."""
    problems = [
        f"--{name.replace('_', '-')} is empty"
        for name in ("out", "prompts", "weights", "from_png", "size")
        if getattr(options, name) == ""
    ]
    problems += [
        f"--{name} {getattr(options, name)}: {wrong}"
        for name in RANGES
        if (wrong := out_of_range(name, getattr(options, name)))
    ]
    if options.low_memory and torch.cuda.is_available() and find_spec("accelerate") is None:
        problems.append('--low_memory needs accelerate: pip install "torchtitan-flux[low_memory]"')
    if options.ema is not None and options.weights is not None:
        problems.append(
            "--ema is of a run's own checkpoint; scripts/convert_checkpoint.py --ema makes weights "
            "of an average"
        )
    for caption in (*options.prompt, options.negative or ""):
        if any("\ud800" <= letter <= "\udfff" for letter in caption):  # as Python reads such bytes
            problems.append(f"{caption!a} is not written in UTF-8")
    if options.from_png is not None:
        conflicts = [f"--{key}" for key in sorted(options.given) if key.startswith("sampling.")]
        for wrong, name in (
            (options.prompts, "--prompts"),
            (len(options.prompt) > 1, "more than one --prompt"),
            (options.count > 1, f"--count {options.count}"),
        ):
            conflicts += [name] if wrong else []
        problems += [
            f"{one}: --from-png draws one picture with its own settings; of these --prompt, "
            "--negative, --size, --steps, --cfg, --guidance and --seed can be changed"
            for one in conflicts
        ]
    return problems


def _unknown(name: str) -> str:
    """What to say of an option that does not exist, given with underscores."""
    for meant, names in OF_OTHER_PROGRAMS.items():
        if name in names.split():
            return f"--{name} is unknown: use {meant}"
    ours = {option[2:].replace("-", "_"): option for option in OPTIONS}
    near = difflib.get_close_matches(name, ours, n=1, cutoff=0.7)
    hint = f"did you mean {ours[near[0]]}?" if near else "./run_infer.sh --help lists all options"
    return f"--{name} is unknown: {hint}"
