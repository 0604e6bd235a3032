"""The options of run_infer.sh."""

import argparse
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from torchtitan_flux.config.command_line import given_keys
from torchtitan_flux.config.problems import ConfigError
from torchtitan_flux.encoders.pretrained import PUBLISHED
from torchtitan_flux.image_file import FORMATS
from torchtitan_flux.inference.picture import Picture
from torchtitan_flux.paths import locate

EXAMPLES = """examples:
  ./run_infer.sh --prompt "a handwritten seven" --count 4 --seed 3 --out sevens.webp
  ./run_infer.sh --from-png seven.png --out again.png

Any --section.key value of the configuration may follow; docs/inference.md tells more."""

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
    "--seed": ("of the noise", {"type": int}),
    "--low_memory": ("blocks from CPU memory: same pictures, slower", {"action": "store_true"}),
}
"""Option -> its help, and other arguments of `add_argument`."""

LEAST = {"steps": 1, "count": 1, "cfg": 0, "guidance": 0, "seed": 0}
"""The lowest value of an option."""

PIPELINE_FOLDERS = {
    **{key.removeprefix("encoder."): folder for key, (folder, _) in PUBLISHED.items()},
    "autoencoder_path": "vae",
}
"""Keys of [encoder] and where a diffusers pipeline folder keeps them."""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the rest: `--section.key value` of the configuration.

    The options have two more attributes: `given`, the keys of the rest, and `recorded`, the
    settings of the picture that --from-png names. A pipeline folder as --weights brings its
    encoders and autoencoder: the rest then names them. Raises ConfigError with all that is wrong.
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
    if options.from_png is not None and not problems:
        try:
            options.recorded = Picture.read(Path(options.from_png))
        except ValueError as error:
            problems.append(f"--from-png: {error}")
    if problems:
        raise ConfigError(problems)
    return options, rest if options.weights is None else _with_pipeline_of(options.weights, rest)


def _with_pipeline_of(weights: str, rest: list[str]) -> list[str]:
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
    """What can never be drawn with, a line each."""
    values = {name: (getattr(options, name), least) for name, least in LEAST.items()}
    problems = [
        f"--{name} {value}: must be a number of at least {least}"
        for name, (value, least) in values.items()
        if value is not None and not least <= value < math.inf
    ]
    if options.low_memory and torch.cuda.is_available() and find_spec("accelerate") is None:
        problems.append('--low_memory needs accelerate: pip install "torchtitan-flux[low_memory]"')
    if options.ema is not None and options.weights is not None:
        problems.append("--ema is of a run's own checkpoint, --weights are others")
    if options.prompt and options.prompts:
        problems.append("--prompt and --prompts: give captions in one way")
    settings = any(key.startswith("sampling.") for key in options.given)
    several = options.prompts or len(options.prompt) > 1 or options.count > 1
    if options.from_png is not None and (several or settings):
        problems.append(
            "--from-png draws one picture with its own settings: beside it --prompt, --negative, "
            "--size, --steps, --cfg, --guidance and --seed count, no --prompts, --count or "
            "--sampling.*"
        )
    return problems
