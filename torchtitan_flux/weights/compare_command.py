"""Command line of scripts/compare_checkpoints.py."""

import argparse
import sys
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.tools.logging import init_logger

from torchtitan_flux.model import FLAVORS
from torchtitan_flux.weights.compare import (
    describe,
    differences,
    forward_difference,
    shape_lines,
)
from torchtitan_flux.weights.convert_command import one_message, open_as


def main(argv: list[str] | None = None) -> None:
    """Print how two sets of weights differ; exit status 0, 1 where they do, 2 on errors."""
    parser = argparse.ArgumentParser(
        prog="compare_checkpoints.py",
        description="How far two sets of FLUX weights are apart, whatever their formats.",
    )
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--flavor", choices=FLAVORS, help="where they do not say it all")
    options = parser.parse_args(argv)
    init_logger()
    with one_message("Cannot compare"):
        first, second = (open_as(one, options.flavor) for one in (options.first, options.second))
        print(describe(first))
        print(describe(second))
        lines = shape_lines(first, second)
        print("\n".join(lines) if lines else "same keys, shapes and element types")
        print(f"{'block':24} {'tensors':>8} {'unequal':>8} {'largest':>11} {'relative':>11}")
        unequal = 0
        for one in differences(first, second):
            unequal += one.unequal
            print(
                f"{one.block:24} {one.tensors:8} {one.unequal:8} {one.largest:11.3e} "
                f"{one.relative:11.3e}"
            )
        forward = forward_difference(first, second)
        told = forward if isinstance(forward, str) else f"relative difference {forward:.3e}"
        print(f"forward pass on the same input: {told}")
    sys.exit(1 if unequal or lines else 0)
