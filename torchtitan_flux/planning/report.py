"""Plans as text and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchtitan_flux.model import FluxModelArgs, flops_per_image
from torchtitan_flux.planning.communication import Mesh
from torchtitan_flux.planning.estimate import (
    GIB,
    PARAMETER_BYTES,
    Estimate,
    microbatches_of,
    tokens_of,
)
from torchtitan_flux.planning.propose import Machine, Proposal, step_messages


def plan_text(
    config: Any,
    args: FluxModelArgs,
    mesh: Mesh,
    found: Estimate,
    memory: float | None,
    machine: Machine | None,
) -> str:
    """Memory and messages of one mesh.

    Args:
        config: with the mesh's degrees.
        args: resolved model arguments.
        mesh: the degrees.
        found: its memory.
        memory: bytes of a card; None leaves out whether it fits.
        machine: speeds that messages are timed by; None gives no times.
    """
    t, frozen = config.training, found.frozen
    img, text = tokens_of(config, args)
    lines = [
        f"{config.model.flavor} at {t.image_size}: {img} image and {text} text tokens",
        f"{mesh.ranks} ranks, {mesh}; local batch {t.local_batch_size}, "
        f"{microbatches_of(config, mesh)} microbatch(es), {t.local_batch_size * mesh.data} images "
        f"each; activation checkpointing {checkpointing(config)}; {t.mixed_precision_param}",
        "",
        "memory of a rank, GiB",
        *_rows(
            {
                "parameters": found.parameters,
                "optimizer": found.optimizer,
                "encoders and codec": frozen.weights,
                "  T5 / CLIP / codec": (frozen.t5, frozen.clip, frozen.codec),
                "and, one after the other:": None,
                **{f"  {name}": size for name, size in found.phases.items() if size},
                "    activations kept": found.activations,
                "    gradients": found.gradients,
                "peak": found.peak,
                "reserved by torch": found.reserved,
            }
        ),
    ]
    if frozen.known:
        lines.append(f"(not found here, sizes as published: {', '.join(frozen.known)})")
    if memory is not None:
        free = (machine or Machine()).free
        verdict = "fits" if found.reserved <= memory * free else "DOES NOT FIT"
        lines.append(
            f"{verdict}: {memory / GIB:.0f} GiB, of which {free:.0%} are planned with "
            f"({memory * free / GIB:.1f})"
        )
    lines += ["", "a rank sends in a step, GiB"]
    own = found.parameters // PARAMETER_BYTES * mesh.fsdp
    messages = step_messages(config, args, mesh, own)
    for m in messages:
        seconds = "" if machine is None else f"  {m.sent / machine.speed(m.dimension, mesh):8.3f} s"
        lines.append(
            f"  {m.what + ' (' + m.kind + ')':42} {m.dimension:10}{m.sent / GIB:9.2f}{seconds}"
        )
    if not messages:
        lines.append("  nothing")
    flops = flops_per_image(args, config.training.image_size, text) * t.local_batch_size
    flops *= microbatches_of(config, mesh) / (mesh.cp * mesh.tp * mesh.pp)
    lines += ["", f"operations of a rank in a step: {flops / 1e12:.0f} TFLOP, nothing run again"]
    return "\n".join(lines)


def _rows(rows: dict[str, Any]) -> list[str]:
    lines = []
    for name, size in rows.items():
        sizes = () if size is None else size if isinstance(size, tuple) else (size,)
        values = " / ".join(f"{value / GIB:.2f}" for value in sizes)
        lines.append(f"  {name:28}{values:>8}")
    return lines


def checkpointing(config: Any) -> str:
    """Mode, with its option."""
    ac = config.activation_checkpoint
    return f"selective {ac.selective_ac_option}" if ac.mode == "selective" else ac.mode


def proposals_text(proposals: Sequence[Proposal], ranks: int, memory: float) -> str:
    """The best meshes, one a line, and why."""
    machine = Machine()
    lines = [
        f"{ranks} ranks, {memory / GIB:.0f} GiB each, {machine.free:.0%} to plan with; best first",
        f"{'mesh':34}{'checkpointing':14}{'batch':>6}{'images':>7}{'reserved GiB':>13}"
        f"{'s/image':>9}",
    ]
    for p in proposals:
        lines.append(
            f"{p.mesh!s:34}{p.checkpointing:14}{p.batch:6}{p.batch * p.mesh.data:7}"
            f"{p.estimate.reserved / GIB:13.1f}{p.cost.per_image:9.3f}"
        )
        lines.append(f"    {p.reason}")
    lines.append(
        f"s/image: seconds of one card, at {machine.flops / 1e12:.0f} TFLOP/s, "
        f"{machine.inside / 1e9:.0f} GB/s within {machine.node} cards and "
        f"{machine.outside / 1e9:.0f} GB/s beyond; assumed, to rank by. batch: of a data rank. "
        "images: of a step."
    )
    return "\n".join(lines)


def draw_ranks(points: dict[str, list[tuple[int, Estimate]]], path: Path, title: str) -> None:
    """Memory of a rank over the number of ranks, one line for each kind of plan."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    some = next(iter(points.values()))
    ranks = [n for n, _ in some]
    states = [(e.parameters + e.gradients + e.optimizer) / GIB for _, e in some]
    axes.plot(ranks, states, "k--", label="parameters, gradients, AdamW states")
    for name, line in points.items():
        axes.plot([n for n, _ in line], [e.reserved / GIB for _, e in line], "o-", label=name)
    axes.axhline(80 * Machine().free, color="grey", linewidth=0.8)
    axes.annotate(
        f"{Machine().free:.0%} of 80 GiB", (ranks[-1], 80 * Machine().free), ha="right", va="bottom"
    )
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="GiB on a rank", title=title)
    axes.set_xticks(ranks, [str(n) for n in ranks])
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
