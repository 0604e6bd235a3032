"""What a run is tied to, stored with its checkpoints and read before anything is built."""

from dataclasses import dataclass, fields
from typing import Any

from torchtitan_flux.randomness import RANDOMNESS_VERSION

Settings = dict[str, str]
"""Keys of the configuration that may change when a run is resumed -> their values as in TOML."""


@dataclass(frozen=True)
class RunFacts:
    """Facts that must not change when a run is resumed.

    Attributes:
        seed: the run's seed.
        global_batch_size: positions of one step.
        context_in_dim, vec_in_dim, in_channels: widths that followed the encoders and the codec.
        randomness_version: scheme of the random numbers.
        depth, depth_single_blocks: blocks of the model; None in checkpoints from before they were
            stored, which have those of their flavor.
    """

    seed: int
    global_batch_size: int
    context_in_dim: int
    vec_in_dim: int
    in_channels: int
    randomness_version: int = RANDOMNESS_VERSION
    depth: int | None = None
    depth_single_blocks: int | None = None

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "RunFacts":
        """From a dictionary; KeyError where one is missing that may not be None."""
        given: dict[str, Any] = {}
        for one in fields(cls):
            value = state.get(one.name) if one.default is None else state[one.name]
            given[one.name] = None if value is None else int(value)
        return cls(**given)
