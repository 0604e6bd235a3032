"""What a run is tied to, stored with its checkpoints and read before the next part is built."""

from dataclasses import dataclass, fields
from typing import Any

from torchtitan_flux.randomness import RANDOMNESS_VERSION

Settings = dict[str, str]
"""Keys of the configuration that may change while a run goes on -> their values as TOML writes
them."""


@dataclass(frozen=True)
class RunFacts:
    """Facts that must not change while a run goes on.

    Attributes:
        seed: the run's seed.
        global_batch_size: positions of one step.
        context_in_dim, vec_in_dim, in_channels: widths that followed the encoders and the codec.
        randomness_version: scheme of the random numbers.
    """

    seed: int
    global_batch_size: int
    context_in_dim: int
    vec_in_dim: int
    in_channels: int
    randomness_version: int = RANDOMNESS_VERSION

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "RunFacts":
        """From a dictionary that holds at least these; KeyError where one is missing."""
        return cls(**{field.name: int(state[field.name]) for field in fields(cls)})
