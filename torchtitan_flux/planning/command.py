"""Command line of scripts/plan.py."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan_flux.model import FIXED_WIDTH_FLAVORS, FLAVORS, FluxModelArgs
from torchtitan_flux.parallel.mesh_checks import model_problems
from torchtitan_flux.planning.communication import Mesh
from torchtitan_flux.planning.estimate import GIB, estimate, microbatches_of, with_mesh
from torchtitan_flux.planning.propose import (
    Machine,
    propose,
    why_nothing_fits,
    with_checkpointing,
)
from torchtitan_flux.planning.report import draw_ranks, plan_text, proposals_text
from torchtitan_flux.startup.load_config import (
    ConfigError,
    exit_on_config_error,
    read_config,
)
from torchtitan_flux.startup.model_args import resolve_model_args, with_configured_blocks

PLOTTED = (8, 16, 32, 64, 128, 256, 512, 1024)


def main() -> None:
    """Print a plan of a mesh, or the meshes that fit."""
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="further arguments: --section.key value, as for run_train.sh"
    )
    parser.add_argument("--mesh", help="degrees, such as replicate=8,shard=8,cp=1,tp=1,pp=1")
    parser.add_argument("--gpus", type=int, help="propose meshes for so many cards")
    parser.add_argument("--memory", type=float, default=80, help="GiB of a card (80)")
    parser.add_argument("--keep", type=int, default=5, help="how many proposals (5)")
    parser.add_argument("--bandwidth", help="GB/s inside,outside of a node, to time messages by")
    parser.add_argument("--plot", type=Path, help="PNG of memory over the number of ranks")
    options, argv = parser.parse_known_args()
    with exit_on_config_error():
        config = read_config(argv)
        args = model_args(config)
        if options.plot:
            _plot(config, args, options.plot)
        elif options.mesh:
            print(_plan(config, args, options))
        elif options.gpus:
            print(_proposals(config, args, options))
        else:
            parser.error("give --mesh, --gpus or --plot")


def model_args(config: Any, weights: str | None = None, training: bool = True) -> FluxModelArgs:
    """The model; fixed flavors need no encoders to be there.

    Args:
        config: the configuration.
        weights: file or folder to draw with.
        training: whether the model will be trained.

    Raises:
        ConfigError: an unknown flavor, or encoders that are needed and missing.
    """
    if config.model.flavor not in FLAVORS:
        raise ConfigError([f"model.flavor = {config.model.flavor!r} is unknown"])
    if config.model.flavor in FIXED_WIDTH_FLAVORS:
        return with_configured_blocks(config, FLAVORS[config.model.flavor], weights, training)
    try:
        return resolve_model_args(config, weights, training)
    except (ValueError, OSError) as error:
        raise ConfigError([str(error)]) from error


def parse_mesh(text: str) -> Mesh:
    """`replicate=8,shard=8`; what is not named is 1.

    Raises:
        ConfigError: a degree that does not exist, or is no number.
    """
    try:
        degrees = {name: int(value) for name, value in (d.split("=") for d in text.split(","))}
        mesh = Mesh(**degrees)
    except (ValueError, TypeError):
        mesh = None
    if mesh is None or min(mesh.replicate, mesh.shard, mesh.cp, mesh.tp, mesh.pp) < 1:
        raise ConfigError(
            [f"--mesh {text}: write replicate=8,shard=8,cp=1,tp=1,pp=1, or some of these"]
        )
    return mesh


def _plan(config: Any, args: FluxModelArgs, options: argparse.Namespace) -> str:
    mesh = parse_mesh(options.mesh)
    config = with_mesh(config, mesh)
    whole = config.training.global_batch_size
    step = config.training.local_batch_size * mesh.data * microbatches_of(config, mesh)
    problems = model_problems(config, args)
    if whole > 0 and whole != step:
        problems.append(f"training.global_batch_size = {whole} is not a multiple of {step}")
    if problems:
        raise ConfigError(problems)
    found, _ = estimate(config, args, mesh)
    machine = None
    if options.bandwidth:
        inside, outside = (float(value) * 1e9 for value in options.bandwidth.split(","))
        machine = Machine(inside=inside, outside=outside)
    return plan_text(config, args, mesh, found, options.memory * GIB, machine)


def _proposals(config: Any, args: FluxModelArgs, options: argparse.Namespace) -> str:
    memory = options.memory * GIB
    found = propose(config, args, options.gpus, memory, keep=options.keep)
    if not found:
        print(why_nothing_fits(config, args, options.gpus, memory), file=sys.stderr)
        sys.exit(1)
    best = found[0]
    plan = with_checkpointing(with_mesh(config, best.mesh), best.checkpointing)
    plan.training.local_batch_size = best.batch
    checked, _ = estimate(plan, args, best.mesh)
    details = plan_text(plan, args, best.mesh, checked, memory, None)
    return f"{proposals_text(found, options.gpus, memory)}\n\nthe first of them:\n\n{details}"


def _plot(config: Any, args: FluxModelArgs, path: Path) -> None:
    """Reserved memory of FSDP on 8 to 1,024 ranks, by kind of checkpointing."""
    points = {}
    for mode in ("none", "op", "full"):
        plan = with_checkpointing(config, mode)
        points[f"checkpointing {mode}"] = [
            (n, estimate(plan, args, Mesh(shard=n))[0]) for n in PLOTTED
        ]
        for n, found in points[f"checkpointing {mode}"]:
            states = found.parameters + found.gradients + found.optimizer
            print(
                f"{mode:6}{n:6} ranks: states {states / GIB:6.2f} GiB, "
                f"reserved {found.reserved / GIB:6.2f}"
            )
    title = f"{config.model.flavor}, local batch {config.training.local_batch_size}, FSDP"
    draw_ranks(points, path, title)
    print(path)
