"""How two sets of weights differ; the command line of scripts/compare_checkpoints.py."""

import argparse
import re
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torchtitan.tools.logging import init_logger

from torchtitan_flux.model import FLAVORS
from torchtitan_flux.weights.convert import same_bits
from torchtitan_flux.weights.convert_command import one_message, open_as
from torchtitan_flux.weights.open import Weights

_BLOCK = re.compile(r"\w+_blocks\.\d+|[^.]+")


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
        a, b = (open_as(one, options.flavor) for one in (options.first, options.second))
        first, second = (
            {n: (shape, weights.dtypes[n]) for n, shape in weights.shapes.items()}
            | {"rotary axes": weights.args.axes_dim}
            for weights in (a, b)
        )
        different = [
            f"{what}: {first.get(what, 'none')} and {second.get(what, 'none')}"
            for what in first | second
            if first.get(what) != second.get(what)
        ]
        print("\n".join(different) or "same names, shapes and element types")
        print(f"{'block':24} {'tensors':>8} {'unequal':>8} {'largest':>11} {'relative':>11}")
        both = [name for name in a.shapes if a.shapes[name] == b.shapes.get(name)]
        for block, names in groupby(both, lambda name: re.match(_BLOCK, name)[0]):  # type: ignore
            names = list(names)
            unequal, largest, relative = difference(a, b, names)
            print(f"{block:24} {len(names):8} {unequal:8} {largest:11.3e} {relative:11.3e}")
            different += [block] * unequal
    sys.exit(1 if different else 0)


def difference(a: Weights, b: Weights, names: Iterable[str]) -> tuple[int, float, float]:
    """Over parameters that both have: how many are not bit-equal, the largest absolute difference,
    and the L2 norm of all differences over that of the first; one parameter is in memory."""
    unequal, largest = 0, torch.zeros((), dtype=torch.float64)
    squared, reference = torch.zeros_like(largest), torch.zeros_like(largest)
    for name in names:
        first, second = a.read(name), b.read(name)
        unequal += not same_bits(first, second)
        # a million elements at a time: float64 copies of a tensor would be four times its size
        for x, y in zip(first.flatten().split(2**20), second.flatten().split(2**20), strict=True):
            apart = x.double() - y.double()
            largest = torch.maximum(largest, apart.abs().max())  # NaN stays, unlike with max()
            squared += apart.square().sum()
            reference += x.double().square().sum()
    relative = (squared / reference).sqrt() if squared != 0 else squared
    return unequal, float(largest), float(relative)
