"""Command line of scripts/convert_checkpoint.py."""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torchtitan.tools.logging import init_logger

from torchtitan_flux.model import FIXED_WIDTH_FLAVORS, FLAVORS
from torchtitan_flux.weights.convert import TARGET_FORMATS, convert
from torchtitan_flux.weights.convert_autoencoder import convert_autoencoder, is_autoencoder
from torchtitan_flux.weights.open import Guidance, Unknown, Weights, open_weights
from torchtitan_flux.weights.pipeline_folder import PipelineParts
from torchtitan_flux.weights.pruned import with_blocks_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; argparse ends the process with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py", description="Weights of FLUX from any format to any other."
    )
    parser.add_argument("source", type=Path, help="a file or folder of weights, of any format")
    parser.add_argument("target", type=Path, help="what is made: a folder, or a .safetensors file")
    parser.add_argument("--to", required=True, choices=TARGET_FORMATS, help="format to write")
    parser.add_argument("--dtype", choices=_DTYPES, help="element type (that of the source)")
    parser.add_argument("--flavor", choices=FLAVORS, help="where the source does not say it all")
    parser.add_argument(
        "--guidance_weights",
        choices=("match", "drop", "initialize"),
        default="match",
        help="leave guidance weights out, or begin with new ones that change nothing yet",
    )
    parser.add_argument(
        "--unknown_weights",
        choices=("refuse", "drop"),
        default="refuse",
        help="what to do with tensors that no FLUX.1 transformer has",
    )
    parser.add_argument(
        "--ema",
        metavar="DECAY",
        nargs="?",
        const="",
        help="take the average of the weights; its decay, where the checkpoint has several",
    )
    parser.add_argument("--max_shard_size", default="10GB", help="of diffusers files (10GB)")
    parser.add_argument("--verify", action="store_true", help="read back, compare every tensor")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--t5", type=Path, help="T5 folder, for --to pipeline")
    parser.add_argument("--clip", type=Path, help="CLIP folder, for --to pipeline")
    parser.add_argument(
        "--autoencoder", type=Path, help="ae.safetensors or vae folder, for --to pipeline"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Convert; exit status 2 with one message where that cannot be done."""
    options = parse(argv)
    init_logger()
    dtype = _DTYPES.get(options.dtype)
    with exit_on_sigterm(), one_message("Cannot convert"):
        if is_autoencoder(options.source):
            convert_autoencoder(
                options.source, options.target, options.to, dtype, options.overwrite, options.verify
            )
            return
        weights = open_as(
            options.source,
            options.flavor,
            options.guidance_weights,
            options.unknown_weights,
            options.ema,
        )
        convert(
            weights,
            options.target,
            options.to,
            dtype=dtype,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            verify=options.verify,
            parts=PipelineParts(options.t5, options.clip, options.autoencoder),
        )


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
    args = None if flavor is None else FLAVORS[flavor]
    if args is None or flavor not in FIXED_WIDTH_FLAVORS:
        return open_weights(path, guidance=guidance, alike=args, unknown=unknown, average=average)
    if guidance == ("drop" if args.guidance_embed else "initialize"):
        raise ValueError(
            f"--guidance_weights {guidance} contradicts --flavor {flavor}; leave one of them out"
        )
    args = with_blocks_of(path, args)
    return open_weights(path, args, guidance, unknown=unknown, average=average)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the program as an exception does: what was begun is removed on the way."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
