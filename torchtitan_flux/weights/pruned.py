"""Models from which blocks were taken, or to which some were added: their weights say how many."""

from dataclasses import replace
from pathlib import Path

from torchtitan_flux.checkpoint.folder import list_steps, step_folder
from torchtitan_flux.checkpoint.manifest import Damaged, Manifest
from torchtitan_flux.model import FLAVORS, FluxModelArgs
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.locations import find


def with_blocks_of(path: Path, args: FluxModelArgs) -> FluxModelArgs:
    """`args` with as many blocks as weights have, where these are of the same widths.

    Reads headers only. Weights that cannot be read, or are of other widths, change nothing: why
    they cannot be used is said where they are opened.
    """
    try:
        found = find(path, "sizes")
        stored = found.declared or architecture.from_shapes(path, found.source.shapes, args)
    except (ValueError, OSError):
        return args
    if (stored.hidden_size, stored.head_dim) != (args.hidden_size, args.head_dim):
        return args
    return replace(args, depth=stored.depth, depth_single_blocks=stored.depth_single_blocks)


def with_blocks_of_run(checkpoints: Path, args: FluxModelArgs) -> FluxModelArgs | None:
    """`args` with as many blocks as the checkpoints in a folder have; None where there are none."""
    for step in list_steps(checkpoints):
        try:
            facts = Manifest.read(step_folder(checkpoints, step)).facts
        except Damaged:
            continue
        if facts.depth is None or facts.depth_single_blocks is None:
            return args  # from before they were stored: always the flavor's
        return replace(args, depth=facts.depth, depth_single_blocks=facts.depth_single_blocks)
    return None


def blocks_told(path: Path, flavor: str, args: FluxModelArgs) -> str | None:
    """A line for the log where a model, by `path`, has other blocks than its flavor."""
    stated = FLAVORS[flavor]
    if (stated.depth, stated.depth_single_blocks) == (args.depth, args.depth_single_blocks):
        return None
    return (
        f"{path} has {args.depth} double and {args.depth_single_blocks} single blocks, "
        f"model.flavor = {flavor!r} {stated.depth} and {stated.depth_single_blocks}: the model is "
        "built with those of the weights"
    )
