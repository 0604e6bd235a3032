"""What `checkpoint.last_save_in_hf` adds to the last checkpoint: a diffusers folder beside it."""

from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)
from torchtitan_flux.torchtitan_shim import give_back_freed_memory

from torchtitan_flux.checkpoint.folder import rename_over
from torchtitan_flux.collectives import from_rank_0, patient_group
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.weights.convert import convert


def exported(checkpoint: Path) -> Path:
    """Where the weights of a checkpoint lie as a diffusers folder."""
    return checkpoint.with_name(f"{checkpoint.name}-hf")


def export_beside(checkpoint: Path, args: FluxModelArgs) -> str:
    """Write that folder, complete or not at all: rank 0, tensor by tensor; collective.

    Returns what went wrong, on every rank; empty when nothing did.
    """

    def export() -> str:
        target = exported(checkpoint)
        try:
            if target.exists():  # from before the run went back to an earlier step
                rename_over(target, "abandoned")
            convert(checkpoint, target, "diffusers", args=args)
        except (ValueError, OSError) as error:
            return f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)
        finally:
            give_back_freed_memory()
        return ""

    with patient_group() as group:
        return from_rank_0(export, group)
