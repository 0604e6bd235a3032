"""Which parameters are trained: asked by optimizer, averages, checkpoint and planner alike."""

from collections.abc import Sequence


def trainable(name: str, only: Sequence[str]) -> bool:
    """Whether a parameter is trained.

    Args:
        name: canonical (model/initial_values.py).
        only: `training.train_only`; names that contain one of these, or every name where it is
            empty.
    """
    return not only or any(part in name for part in only)
