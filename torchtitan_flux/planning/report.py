"""Plans as text."""

from collections.abc import Sequence

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.formatting import format_bytes
from torchtitan_flux.model import FluxModelArgs, flops_per_image
from torchtitan_flux.planning.communication import Mesh
from torchtitan_flux.planning.estimate import (
    Estimate,
    microbatches_of,
    parameter_bytes,
    tokens_of,
)
from torchtitan_flux.planning.propose import USABLE, Proposal, step_messages


def plan_text(
    config: FluxJobConfig, args: FluxModelArgs, mesh: Mesh, found: Estimate, memory: float
) -> str:
    """Memory and messages of one mesh.

    Args:
        config: with the mesh's degrees.
        args: resolved model arguments.
        mesh: the degrees.
        found: its memory.
        memory: bytes of a card.
    """
    t, ac, frozen = config.training, config.activation_checkpoint, found.frozen
    img, text = tokens_of(config, args)
    option = f" {ac.selective_ac_option}" if ac.mode == "selective" else ""
    summed = microbatches_of(config, mesh)
    rows = {
        "parameters": found.parameters,
        "optimizer": found.optimizer,
        "averages": found.averages,
        "T5": frozen.t5,
        "CLIP": frozen.clip,
        "codec": frozen.codec,
        **{f"while {name}": size for name, size in found.phases.items() if size},
        "  of it activations": found.activations,
        "  of it gradients": found.gradients,
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
    if frozen.known:
        lines.append(f"(not found here, sizes as published: {', '.join(frozen.known)})")
    verdict = "fits" if found.reserved <= memory * USABLE else "DOES NOT FIT"
    lines += [f"{verdict}: {format_bytes(memory)}, of which {USABLE:.0%} are planned with", ""]
    own = found.parameters // parameter_bytes(config) * mesh.fsdp
    sent = step_messages(config, args, mesh, own)
    lines.append("a rank sends in a step" if sent else "a rank sends nothing")
    lines += [
        f"  {f'{m.what} ({m.kind})':42}{format_bytes(m.sent):>12}  {m.dimension}" for m in sent
    ]
    flops = flops_per_image(args, t.image_size, text) * t.local_batch_size * summed
    flops /= mesh.cp * mesh.tp * mesh.pp
    return "\n".join([*lines, f"operations of a rank in a step: {flops / 1e12:.0f} TFLOP"])


def proposals_text(
    proposals: Sequence[Proposal], ranks: int, memory: float, local_batch: int
) -> str:
    """The meshes that fit, one a line."""
    lines = [
        f"{ranks} ranks, {format_bytes(memory)} each, {USABLE:.0%} to plan with",
        f"{'mesh':34}{'checkpointing':14}{'images':>7}{'reserved':>12}{'sent a step':>14}",
    ]
    lines += [
        f"{p.mesh!s:34}{p.checkpointing:14}{local_batch * p.mesh.data:7}"
        f"{format_bytes(p.estimate.reserved):>12}{format_bytes(p.sent):>14}"
        for p in proposals
    ]
    return "\n".join(lines)
