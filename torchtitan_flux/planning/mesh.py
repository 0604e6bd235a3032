"""Degrees of a mesh, and a configuration with them."""

import copy
from dataclasses import asdict, dataclass, replace

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.config import Parallelism

from torchtitan_flux.config.job_config import FluxJobConfig, Training
from torchtitan_flux.config.problems import ConfigError

KEYS = {
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
}
"""Degree -> key of [parallelism]."""


@dataclass(frozen=True)
class Mesh:
    """Degrees of [parallelism]; the ranks of a context group also share the weights' shards."""

    replicate: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.cp * self.tp * self.pp

    @property
    def data(self) -> int:
        """Ranks that read different samples."""
        return self.replicate * self.shard

    @property
    def fsdp(self) -> int:
        """Ranks that a weight is sharded over."""
        return self.shard * self.cp

    def microbatches(self, t: Training) -> int:
        """Whose gradients are summed before they are communicated."""
        return max(1, t.global_batch_size // (t.local_batch_size * self.data))

    def __str__(self) -> str:
        return ",".join(f"{n}={d}" for n, d in asdict(self).items() if d > 1) or "shard=1"


def parse_mesh(text: str) -> Mesh:
    """`replicate=8,shard=8`; what is not named is 1.

    Raises:
        ConfigError: a degree that does not exist, or is no number.
    """
    try:
        mesh = Mesh(**{name: int(value) for name, value in (d.split("=") for d in text.split(","))})
    except (ValueError, TypeError):
        mesh = Mesh(0)
    if min(asdict(mesh).values()) < 1:
        raise ConfigError(
            [f"--mesh {text}: write replicate=8,shard=8,cp=1,tp=1,pp=1, or some of these"]
        )
    return mesh


def mesh_of(p: Parallelism, ranks: int) -> Mesh:
    """Degrees of section [parallelism]; -1 for the shard degree takes what is left."""
    mesh = Mesh(**{name: getattr(p, key) for name, key in KEYS.items()})
    return mesh if mesh.shard > 0 else replace(mesh, shard=max(1, ranks // -mesh.ranks))


def with_mesh(config: FluxJobConfig, mesh: Mesh) -> FluxJobConfig:
    """A copy of the configuration with these degrees."""
    config = copy.deepcopy(config)
    for name, key in KEYS.items():
        setattr(config.parallelism, key, getattr(mesh, name))
    return config
