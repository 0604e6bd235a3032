"""What else a run does around its steps, without a line in the trainer."""

from torch.distributed.checkpoint.stateful import Stateful


class Hook:
    """Called by FluxTrainer on every rank, hooks in the same order; the methods may communicate."""

    def states(self) -> dict[str, Stateful]:
        """What checkpoints hold of it, by a name of its own; tensors by name, DTensors included."""
        return {}

    def acts_after(self, step: int) -> bool:
        """Whether `after_step` looks at the weights: the step's flags are then read before it."""
        return False

    def after_optimizer_step(self, step: int) -> None:
        """The weights are those of `step`; gradients are still there."""

    def after_step(self, step: int) -> None:
        """The step's checkpoint and validation are done."""

    def resumed_when_finished(self, step: int) -> None:
        """A run that was complete was started again: make up for what it lacks."""

    def results(self, step: int) -> list[str]:
        """Lines that a complete run ends with."""
        return []
