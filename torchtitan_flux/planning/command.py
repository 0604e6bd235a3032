"""Command line of scripts/plan.py."""

import argparse
import logging
import sys

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import Problem
from torchtitan_flux.model import FIXED_WIDTH_FLAVORS, FLAVORS, FluxModelArgs
from torchtitan_flux.parallel.mesh_checks import model_problems
from torchtitan_flux.planning.communication import Mesh
from torchtitan_flux.planning.estimate import GIB, estimate, microbatches_of, with_mesh
from torchtitan_flux.planning.propose import propose
from torchtitan_flux.planning.report import plan_text, proposals_text
from torchtitan_flux.startup.load_config import (
    ConfigError,
    exit_on_config_error,
    read_config,
)
from torchtitan_flux.startup.model_args import resolve_model_args, with_configured_blocks


def main() -> None:
    """Print a plan of a mesh, or the meshes that fit."""
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="further arguments: --section.key value, as for run_train.sh"
    )
    parser.add_argument("--mesh", help="degrees, such as replicate=8,shard=8,cp=1,tp=1,pp=1")
    parser.add_argument("--gpus", type=int, help="list meshes of so many cards that fit")
    parser.add_argument("--memory", type=float, default=80, help="GiB of a card (80)")
    parser.add_argument("--keep", type=int, default=5, help="how many proposals (5)")
    options, argv = parser.parse_known_args()
    with exit_on_config_error():
        config = read_config(argv)
        args = model_args(config)
        if options.mesh:
            print(_plan(config, args, options))
        elif options.gpus:
            print(_proposals(config, args, options))
        else:
            parser.error("give --mesh or --gpus")


def model_args(
    config: FluxJobConfig, weights: str | None = None, training: bool = True
) -> FluxModelArgs:
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


def _plan(config: FluxJobConfig, args: FluxModelArgs, options: argparse.Namespace) -> str:
    mesh = parse_mesh(options.mesh)
    config = with_mesh(config, mesh)
    whole = config.training.global_batch_size
    step = config.training.local_batch_size * mesh.data * microbatches_of(config, mesh)
    problems = list(model_problems(config, args))
    if whole > 0 and whole != step:
        problems.append(
            Problem("training.global_batch_size", f"{whole} is not a multiple of {step}")
        )
    if problems:
        raise ConfigError(problems)
    found, _ = estimate(config, args, mesh)
    return plan_text(config, args, mesh, found, options.memory * GIB)


def _proposals(config: FluxJobConfig, args: FluxModelArgs, options: argparse.Namespace) -> str:
    memory = options.memory * GIB
    found = propose(config, args, options.gpus, memory, keep=options.keep)
    if not found:
        print(
            f"nothing fits {options.memory:g} GiB on {options.gpus} ranks with a local batch of "
            f"{config.training.local_batch_size}: more ranks share more; --mesh shard="
            f"{options.gpus} says what it takes",
            file=sys.stderr,
        )
        sys.exit(1)
    return proposals_text(found, options.gpus, memory, config.training.local_batch_size)
