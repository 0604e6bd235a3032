"""Prompts -> pictures, with the newest checkpoint of a run.

./run_infer.sh --prompt "a handwritten seven" --out seven.png
./run_infer.sh --prompts prompts.txt --steps 28 --cfg 2 --seed 3 --sampling.schedule schnell
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torchtitan_flux.engine  # noqa: F401  (before torchtitan)

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.tools.logging import init_logger, logger

from torchtitan_flux.config.manager import load_config_or_exit
from torchtitan_flux.config.paths import locate
from torchtitan_flux.config.resolve import resolve_model_args, sample_settings
from torchtitan_flux.generate import SampleSettings, save_png, to_pil
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.training.console import quieten_libraries
from torchtitan_flux.training.session import open_session


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the rest: `--section.key value` of the configuration."""
    parser = argparse.ArgumentParser(
        prog="run_infer.sh",
        description="Draw pictures with a trained model.",
        epilog="Any --section.key value of the configuration may follow.",
    )
    parser.add_argument("--prompt", action="append", default=[], help="caption; may be repeated")
    parser.add_argument("--prompts", help="file with one caption a line")
    parser.add_argument("--out", help="PNG file (one picture) or folder")
    parser.add_argument("--size", help="pixels: HEIGHTxWIDTH or one number")
    parser.add_argument("--steps", type=int, help="Euler steps")
    parser.add_argument("--cfg", type=float, help="scale of classifier-free guidance, 1 is off")
    parser.add_argument("--guidance", type=float, help="guidance input of flux-dev")
    parser.add_argument("--negative", default="", help="caption to move away from, with --cfg")
    parser.add_argument("--seed", type=int, help="of the noise")
    return parser.parse_known_args(argv)


def read_prompts(options: argparse.Namespace, config: Any) -> list[str]:
    """Captions from the command line, else from the file that is named.

    Raises:
        FileNotFoundError: naming the file that does not exist.
        ValueError: when there is no caption at all.
    """
    if options.prompt:
        return options.prompt
    name = options.prompts or config.inference.prompts_path
    path = locate(name)
    if path is None:
        raise FileNotFoundError(f"{name} does not exist; give --prompt or --prompts FILE")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise ValueError(f"{path} holds no caption")
    return [line for line in lines if line]


def settings_of(options: argparse.Namespace, config: Any, args: FluxModelArgs) -> SampleSettings:
    """The run's own settings for pictures, changed where the command line says so."""
    base = sample_settings(config, args)
    if config.inference.img_size:
        base = replace(base, size=ImageSize.of(config.inference.img_size))
    if options.size:
        sides = options.size.lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() for side in sides):
            raise ValueError(f"--size {options.size}: give HEIGHTxWIDTH or one number of pixels")
        base = replace(base, size=ImageSize(int(sides[0]), int(sides[-1])))
    if options.guidance is not None and not args.guidance_embed:
        raise ValueError(f"--guidance: model.flavor = {config.model.flavor!r} takes no guidance")
    changes = {
        "steps": options.steps,
        "cfg": options.cfg,
        "guidance": options.guidance,
        "seed": options.seed,
    }
    base = replace(base, **{name: value for name, value in changes.items() if value is not None})
    if base.steps < 1:
        raise ValueError(f"--steps {base.steps}: at least 1")
    args.geometry.check(base.size)
    return base


def targets(out: str | None, config: Any, prompts: list[str]) -> list[Path]:
    """Where each picture goes.

    Raises:
        ValueError: when one file is to hold several pictures.
    """
    folder = Path(config.job.dump_folder) / config.inference.save_img_folder
    if out is not None and Path(out).suffix.lower() == ".png":
        if len(prompts) > 1:
            raise ValueError(f"--out {out}: {len(prompts)} pictures need a folder, not a file")
        return [Path(out)]
    folder = folder if out is None else Path(out)
    if folder.suffix and not folder.is_dir():
        raise ValueError(f"--out {out}: pictures are PNG files; name a .png file or a folder")
    return [folder / f"{i:04d}-{_slug(prompt)}.png" for i, prompt in enumerate(prompts)]


def _slug(prompt: str) -> str:
    """A file name's worth of a caption."""
    return "".join(c if c.isalnum() else "-" for c in prompt.lower())[:60].strip("-") or "empty"


@record
def main() -> None:
    """Entry point of every rank."""
    init_logger()
    quieten_libraries()
    options, rest = parse(sys.argv[1:])
    config = load_config_or_exit(rest, training=False)
    try:
        prompts = read_prompts(options, config)
        paths = targets(options.out, config, prompts)
        settings = settings_of(options, config, resolve_model_args(config))
        session = open_session(config, batch_size=config.inference.local_batch_size)
    except (ValueError, FileNotFoundError) as error:
        print(f"Cannot draw: {error}", file=sys.stderr)
        sys.exit(2)
    images = session.painter.draw(prompts, settings, options.negative)
    if torch.distributed.get_rank() == 0:
        for index, (image, prompt, path) in enumerate(zip(images, prompts, paths, strict=True)):
            save_png(
                to_pil(image),
                path,
                settings,
                prompt=prompt,
                negative_prompt=options.negative,
                index=index,
                flavor=config.model.flavor,
                checkpoint=str(session.checkpoint),
            )
            logger.info(f"{prompt!r} -> {path}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
