"""Command line of scripts/plan.py."""

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.formatting import format_bytes
from torchtitan_flux.model import FIXED_WIDTH_FLAVORS, FLAVORS, FluxModelArgs
from torchtitan_flux.parallel.dims import model_problems
from torchtitan_flux.parallel.pipeline_plan import pipeline_fit
from torchtitan_flux.planning.dry_run import DryRun, Mesh, dry_run, parse_mesh, with_mesh
from torchtitan_flux.planning.estimate import (
    GIB,
    Estimate,
    estimate,
    estimate_of,
    resharded,
    sent_bytes,
)
from torchtitan_flux.startup.load_config import (
    ConfigError,
    exit_on_config_error,
    located,
    read_config,
)
from torchtitan_flux.startup.model_args import resolve_model_args, with_configured_blocks

NODE = 8
"""Cards that tensor parallelism may join."""
USABLE = 0.95
"""Share of a card's memory that torch's allocator may take; the rest is the driver's."""


@dataclass(frozen=True)
class Proposal:
    """A mesh that fits; `sent` are bytes of a rank in a step."""

    mesh: Mesh
    estimate: Estimate
    sent: int


def main() -> None:
    """Print a plan of a mesh, or the meshes that fit."""
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="further arguments: --section.key value, as for run_train.sh"
    )
    parser.add_argument("--mesh", help="degrees, such as replicate=8,shard=8,cp=1,tp=1,pp=1")
    parser.add_argument("--gpus", type=int, help="list the meshes of N cards that fit")
    parser.add_argument("--memory", type=float, default=80, help="GiB of a card (80)")
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
            if problems := [*model_problems(config, args), *pipeline_fit(config, args)]:
                raise ConfigError(located(problems, config))
            print(plan_text(config, args, mesh, *estimate(config, args, mesh), memory))
            return
    batch = config.training.local_batch_size
    found = propose(config, args, options.gpus, memory)
    if not found:
        parser.exit(
            1,
            f"nothing fits {options.memory:g} GiB on {options.gpus} ranks with a local batch of "
            f"{batch}: set --activation_checkpoint.mode full, or take more ranks\n",
        )
    print(proposals_text(found, batch))


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


def propose(
    config: FluxJobConfig, args: FluxModelArgs, ranks: int, memory: float, keep: int = 5
) -> list[Proposal]:
    """The first meshes on which the configured batch fits cards of `memory` bytes, by memory, then
    bytes sent."""
    runs: dict[tuple[int, Mesh], DryRun] = {}
    found: list[Proposal] = []
    microbatch = config.parallelism.pipeline_parallel_microbatch_size
    for mesh in meshes(args, ranks):
        if config.training.local_batch_size % microbatch and mesh.pp > 1:
            continue
        # replicas and shards follow from one run, whatever their numbers
        probe = replace(mesh, replicate=2, shard=2, pp=min(mesh.pp, 2))
        key = min(2, mesh.microbatches(config.training)), probe
        if key not in runs:
            runs[key] = dry_run(config, args, probe, key[0])
        run = resharded(runs[key], probe.fsdp / mesh.fsdp, args)
        need = estimate_of(run, config, args, mesh)
        if need.reserved <= memory * USABLE:
            sent = sum(sent_bytes(run, config, args, mesh).values())
            found.append(Proposal(mesh, need, sent))
    return sorted(found, key=lambda one: (one.estimate.reserved, one.sent))[:keep]


def meshes(args: FluxModelArgs, ranks: int) -> Iterator[Mesh]:
    """Meshes of `ranks` ranks that the model can be split over, tensor groups within a node."""
    for pp in _divisors(ranks, min(8, args.depth + args.depth_single_blocks)):
        for tp in _divisors(ranks // pp, NODE):
            for cp in _divisors(ranks // pp // tp, args.num_heads):
                # the heads of a rank are shared out among its context group
                if args.num_heads % (tp * cp) == 0:
                    rest = ranks // pp // tp // cp
                    for shard in _divisors(rest, rest):
                        yield Mesh(rest // shard, shard, cp, tp, pp)


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def plan_text(
    config: FluxJobConfig,
    args: FluxModelArgs,
    mesh: Mesh,
    found: Estimate,
    run: DryRun,
    memory: float,
) -> str:
    """Memory and messages of one mesh, on cards with `memory` bytes."""
    rows = {
        "parameters": found.parameters,
        "optimizer": found.optimizer,
        "averages": found.averages,
        "T5": found.frozen.t5,
        "CLIP": found.frozen.clip,
        "autoencoder": found.frozen.autoencoder,
        **{f"while {name}": size for name, size in found.phases.items()},
        "  of which activations": found.activations,
        "  of which gradients": found.gradients,
        "peak": found.peak,
        "reserved by torch": found.reserved,
    }
    messages = sent_bytes(run, config, args, mesh)
    sent = {f"{kind} over {dimension}": size for (kind, dimension), size in messages.items()}
    verdict = "fits" if found.reserved <= memory * USABLE else "DOES NOT FIT"
    return "\n".join(
        [
            f"{config.model.flavor} at {config.training.image_size}, {mesh.ranks} ranks, {mesh}",
            "memory of a rank",
            *_table(rows),
            f"{verdict}: {format_bytes(memory)}, of which {USABLE:.0%} are planned with",
            "a rank sends in a step",
            *_table(sent),
        ]
    )


def _table(rows: Mapping[str, int]) -> list[str]:
    return [f"  {name:42}{format_bytes(size):>12}" for name, size in rows.items() if size]


def proposals_text(proposals: Sequence[Proposal], local_batch: int) -> str:
    """The meshes that fit, one a line."""
    lines = [f"{'mesh':34}{'images':>7}{'reserved':>12}{'sent a step':>14}"]
    for p in proposals:
        reserved, sent = format_bytes(p.estimate.reserved), format_bytes(p.sent)
        lines.append(f"{p.mesh!s:34}{local_batch * p.mesh.data:7}{reserved:>12}{sent:>14}")
    return "\n".join(lines)
