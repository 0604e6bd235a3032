"""Command line of scripts/plan.py."""

import argparse
import logging
from collections.abc import Sequence

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import Problem
from torchtitan_flux.formatting import format_bytes
from torchtitan_flux.model import FIXED_WIDTH_FLAVORS, FLAVORS, FluxModelArgs, flops_per_image
from torchtitan_flux.parallel.mesh_checks import model_problems
from torchtitan_flux.planning.dry_run import DryRun, tokens_of
from torchtitan_flux.planning.estimate import GIB, Estimate, estimate, sent_bytes
from torchtitan_flux.planning.mesh import Mesh, parse_mesh, with_mesh
from torchtitan_flux.planning.propose import USABLE, Proposal, propose
from torchtitan_flux.startup.load_config import (
    ConfigError,
    exit_on_config_error,
    located,
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
    parser.add_argument("--gpus", type=int, help="list the meshes of N cards that fit")
    parser.add_argument("--memory", type=float, default=80, help="GiB of a card (80)")
    parser.add_argument("--keep", type=int, default=5, help="how many proposals (5)")
    options, argv = parser.parse_known_args()
    with exit_on_config_error():
        config = read_config(argv)
        args = model_args(config)
        if not options.mesh and not options.gpus:
            parser.error("give --mesh or --gpus")
        memory = options.memory * GIB
        if options.mesh:
            mesh = parse_mesh(options.mesh)
            config = with_mesh(config, mesh)
            check_mesh(config, args, mesh)
            print(plan_text(config, args, mesh, *estimate(config, args, mesh), memory))
            return
    batch = config.training.local_batch_size
    found = propose(config, args, options.gpus, memory, keep=options.keep)
    if not found:
        parser.exit(
            1,
            f"nothing fits {options.memory:g} GiB on {options.gpus} ranks with a local batch of "
            f"{batch}: more ranks share more; --mesh shard={options.gpus} says what it takes\n",
        )
    print(proposals_text(found, options.gpus, memory, batch))


def model_args(config: FluxJobConfig) -> FluxModelArgs:
    """The model; fixed flavors need no encoders to be there.

    Raises:
        ConfigError: an unknown flavor, or encoders that are needed and missing.
    """
    if config.model.flavor not in FLAVORS:
        raise ConfigError([f"model.flavor = {config.model.flavor!r} is unknown"])
    if config.model.flavor in FIXED_WIDTH_FLAVORS:
        return with_configured_blocks(config, FLAVORS[config.model.flavor])
    return resolve_model_args(config)


def check_mesh(config: FluxJobConfig, args: FluxModelArgs, mesh: Mesh) -> None:
    """Raises ConfigError where the model or the global batch cannot be cut by these degrees."""
    t = config.training
    step = t.local_batch_size * mesh.data * mesh.microbatches(t)
    problems = list(model_problems(config, args))
    if t.global_batch_size > 0 and t.global_batch_size != step:
        problems.append(Problem("training.global_batch_size", f"is not a multiple of {step}"))
    if problems:
        raise ConfigError(located(problems, config))


def plan_text(
    config: FluxJobConfig,
    args: FluxModelArgs,
    mesh: Mesh,
    found: Estimate,
    run: DryRun,
    memory: float,
) -> str:
    """Memory and messages of one mesh, on cards with `memory` bytes."""
    t, ac, frozen = config.training, config.activation_checkpoint, found.frozen
    img, text = tokens_of(config, args)
    option = f" {ac.selective_ac_option}" if ac.mode == "selective" else ""
    summed = mesh.microbatches(t)
    rows = {
        "parameters": found.parameters,
        "optimizer": found.optimizer,
        "averages": found.averages,
        "T5": frozen.t5,
        "CLIP": frozen.clip,
        "autoencoder": frozen.autoencoder,
        **{f"while {name}": size for name, size in found.phases.items() if size},
        "  of which activations": found.activations,
        "  of which gradients": found.gradients,
        "peak": found.peak,
        "reserved by torch": found.reserved,
    }
    lines = [
        f"{config.model.flavor} at {t.image_size}: {img} image and {text} text tokens",
        f"{mesh.ranks} ranks, {mesh}; local batch {t.local_batch_size}, {summed} microbatch(es), "
        f"{t.local_batch_size * mesh.data} images each; activation checkpointing "
        f"{ac.mode}{option}; {t.mixed_precision_param}",
        "",
        "memory of a rank",
        *(f"  {name:42}{format_bytes(size):>12}" for name, size in rows.items() if size),
    ]
    if frozen.published:
        lines.append(f"(not found here, sizes as published: {', '.join(frozen.published)})")
    verdict = "fits" if found.reserved <= memory * USABLE else "DOES NOT FIT"
    lines += [f"{verdict}: {format_bytes(memory)}, of which {USABLE:.0%} are planned with", ""]
    sent = sent_bytes(run, config, args, mesh)
    lines.append("a rank sends in a step" if sent else "a rank sends nothing")
    lines += [
        f"  {f'{kind} over {dimension}':42}{format_bytes(size):>12}"
        for (kind, dimension), size in sorted(sent.items(), key=lambda item: -item[1])
    ]
    flops = flops_per_image(args, t.image_size, text) * t.local_batch_size * summed
    flops /= mesh.cp * mesh.tp * mesh.pp
    return "\n".join([*lines, f"operations of a rank in a step: {flops / 1e12:.0f} TFLOP"])


def proposals_text(
    proposals: Sequence[Proposal], ranks: int, memory: float, local_batch: int
) -> str:
    """The meshes that fit, one a line."""
    return "\n".join(
        [
            f"{ranks} ranks, {format_bytes(memory)} each, {USABLE:.0%} to plan with; least memory "
            "first",
            f"{'mesh':34}{'checkpointing':14}{'images':>7}{'reserved':>12}{'sent a step':>14}",
            *(
                f"{p.mesh!s:34}{p.checkpointing:14}{local_batch * p.mesh.data:7}"
                f"{format_bytes(p.estimate.reserved):>12}{format_bytes(p.sent):>14}"
                for p in proposals
            ),
        ]
    )
