"""What `checkpoint.last_save_in_hf` adds to the last checkpoint: a diffusers folder beside it."""

from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)
from torchtitan_flux.torchtitan_shim import give_back_freed_memory

import torch.distributed as dist

from torchtitan_flux.checkpoint.folder import WAITING, rename_over
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.weights.convert import convert


def exported(checkpoint: Path) -> Path:
    """Where the weights of a checkpoint lie as a diffusers folder."""
    return checkpoint.with_name(f"{checkpoint.name}-hf")


def export_beside(checkpoint: Path, args: FluxModelArgs) -> str:
    """Write that folder, complete or not at all: rank 0, tensor by tensor; collective.

    The others wait in a group of their own: writing 12B takes longer than any step may take.

    Returns:
        what went wrong, on every rank; empty when nothing did.
    """
    box, target = [""], exported(checkpoint)
    group = dist.new_group(backend="gloo", timeout=WAITING)
    assert isinstance(group, dist.ProcessGroup)
    if dist.get_rank() == 0:
        try:
            if target.exists():  # from before the run went back to an earlier step
                rename_over(target, "abandoned")
            convert(checkpoint, target, "diffusers", args=args)
        except (ValueError, OSError) as error:
            box = [f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)]
        give_back_freed_memory()
    dist.broadcast_object_list(box, src=0, group=group)
    dist.destroy_process_group(group)
    return box[0]
