"""Command line of scripts/convert_checkpoint.py."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torchtitan.tools.logging import init_logger

from torchtitan_flux.model import FIXED_WIDTH_FLAVORS, FLAVORS
from torchtitan_flux.weights.convert import TARGET_FORMATS, convert
from torchtitan_flux.weights.convert_autoencoder import convert_autoencoder, is_autoencoder
from torchtitan_flux.weights.open import Guidance, Unknown, Weights, open_weights
from torchtitan_flux.weights.pruned import with_blocks_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; argparse ends the process with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py", description="Weights of FLUX from any format to any other."
    )
    add = parser.add_argument
    add("source", type=Path, help="a file or folder of weights, of any format")
    add("target", type=Path, help="what is made: a folder, or a .safetensors file")
    add("--to", required=True, choices=TARGET_FORMATS, help="format to write")
    add("--dtype", choices=_DTYPES, help="element type (that of the source)")
    add("--flavor", choices=FLAVORS, help="where the source does not say it all")
    what = "leave guidance weights out, or begin with new ones that change nothing yet"
    add("--guidance_weights", choices=get_args(Guidance), default="match", help=what)
    what = "what to do with tensors that no FLUX.1 transformer has"
    add("--unknown_weights", choices=get_args(Unknown), default="refuse", help=what)
    what = "take the average of the weights; its decay, where the checkpoint has several"
    add("--ema", metavar="DECAY", nargs="?", const="", help=what)
    add("--max_shard_size", default="10GB", help="of diffusers files (10GB)")
    add("--verify", action="store_true", help="read back, compare every tensor")
    what = "pipeline whose encoders go along, for --to pipeline (the source, where it is one)"
    add("--base", type=Path, help=what)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Convert; exit status 2 with one message where that cannot be done."""
    given = parse(argv)
    init_logger()
    dtype = _DTYPES.get(given.dtype)
    with one_message("Cannot convert"):
        common = {"dtype": dtype, "verify": given.verify}
        if is_autoencoder(given.source):
            convert_autoencoder(given.source, given.target, given.to, **common)
            return
        g, u = given.guidance_weights, given.unknown_weights
        weights = open_as(given.source, given.flavor, g, u, given.ema)
        common |= {"max_shard_size": given.max_shard_size, "base": given.base}
        convert(weights, given.target, given.to, **common)


def open_as(
    path: Path,
    flavor: str | None,
    guidance: Guidance = "match",
    unknown: Unknown = "refuse",
    average: str | None = None,
) -> Weights:
    """Open weights; a flavor stands in for what they do not say of themselves.

    Widths that follow the encoders are taken from the weights, unless the flavor fixes them.
    """
    args, fixed = FLAVORS[flavor] if flavor else None, None
    if args is not None and flavor in FIXED_WIDTH_FLAVORS:
        if guidance == ("drop" if args.guidance_embed else "initialize"):
            raise ValueError(f"--guidance_weights {guidance} contradicts --flavor {flavor}")
        args, fixed = None, with_blocks_of(path, args)
    return open_weights(path, fixed, guidance, flavor=args, unknown=unknown, average=average)


@contextmanager
def one_message(what: str) -> Iterator[None]:
    """What a user got wrong becomes one message and exit status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"{what}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{what}: stopped; nothing was kept", file=sys.stderr)
        sys.exit(130)
