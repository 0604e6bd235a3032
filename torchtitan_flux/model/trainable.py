"""Which parameters are trained: asked by optimizer, averages, checkpoint and planner alike."""

from collections.abc import Sequence


def trainable(name: str, only: Sequence[str]) -> bool:
    """Whether the parameter of that canonical name is trained; `only` is `training.train_only`."""
    return not only or any(part in name for part in only)
