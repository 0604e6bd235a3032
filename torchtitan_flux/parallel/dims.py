"""Meshes: torchtitan's, with the data-parallel dimensions kept also where their size is one."""

from collections.abc import Iterator
from dataclasses import dataclass

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.config import Parallelism
from torchtitan.distributed import ParallelDims

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import Problem, violated
from torchtitan_flux.config.schema import get
from torchtitan_flux.model import FluxModelArgs


@dataclass
class FluxParallelDims(ParallelDims):
    """ParallelDims whose dp_replicate and fsdp meshes always exist.

    One call of fully_shard on `data_mesh` is then one rank, DDP, FSDP and HSDP alike (contract 4).
    torchtitan's own drops dimensions of size one, and mixed precision with them.
    """

    _peer_group: ProcessGroup | None = None

    def _mesh_exist(self, name: str, degree: int) -> bool:
        return name in ("dp_replicate", "fsdp") or super()._mesh_exist(name, degree)

    @classmethod
    def of(cls, parallelism: Parallelism, world_size: int) -> "FluxParallelDims":
        """The dimensions that section [parallelism] asks for."""
        return cls(
            dp_replicate=parallelism.data_parallel_replicate_degree,
            dp_shard=parallelism.data_parallel_shard_degree,
            cp=parallelism.context_parallel_degree,
            tp=parallelism.tensor_parallel_degree,
            pp=parallelism.pipeline_parallel_degree,
            ep=1,
            etp=1,
            world_size=world_size,
        )

    @property
    def fsdp_enabled(self) -> bool:
        """fully_shard is applied on any number of ranks, so torchtitan's AMP path never is."""
        return True

    @property
    def data_mesh(self) -> DeviceMesh:
        """The mesh that parameters live on: (dp_replicate, fsdp), without replicas (fsdp) alone.

        FSDP2 all-reduces gradients over a replicate dimension of any size; over one rank that is
        a pass over all of them for nothing.
        """
        return self.get_mesh(["dp_replicate", "fsdp"] if self.dp_replicate > 1 else "fsdp")

    @property
    def data_degree(self) -> int:
        """Ranks that read different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def data_rank(self) -> int:
        """Which of them this rank is; context and tensor peers share a number."""
        return self.get_mesh("batch").get_local_rank() if self.dp_enabled else 0

    @property
    def data_group(self) -> ProcessGroup | None:
        """The ranks that read different samples, or None where there is one."""
        return self.get_mesh("batch").get_group() if self.dp_enabled else None

    @property
    def peer_group(self) -> ProcessGroup | None:
        """The ranks that work on the same samples, or None where each has its own; collective."""
        if self.world_size == self.data_degree:
            return None
        if self._peer_group is None:
            self.get_mesh("fsdp")  # builds them all
            ranks = self._global_meshes["dataloading"].mesh  # [pp, batch, cp, tp]
            of_each_batch = ranks.movedim(1, 0).flatten(1).tolist()
            self._peer_group, _ = dist.new_subgroups_by_enumeration(of_each_batch)  # type: ignore
        return self._peer_group


PEERS = ("context_parallel_degree", "tensor_parallel_degree", "pipeline_parallel_degree")
"""Keys of the ranks that share samples."""


def peer_degree(parallelism: Parallelism) -> int:
    """Ranks that work on the same samples: context, tensor and pipeline."""
    degree = 1
    for key in PEERS:
        degree *= getattr(parallelism, key)
    return degree


def mesh_problems(config: FluxJobConfig, world: int) -> Iterator[Problem]:
    """Degrees and batch sizes that do not make the `world` ranks that were started."""
    p, t = config.parallelism, config.training
    keys = [f"parallelism.{name}" for name in PEERS]
    if min(degrees := [get(config, key) for key in keys]) < 1:
        yield from violated(
            *((n < 1, key, "must be at least 1") for key, n in zip(keys, degrees, strict=True))
        )
        return
    replicate, shard = p.data_parallel_replicate_degree, p.data_parallel_shard_degree
    peers = peer_degree(p)
    if shard == -1 and replicate >= 1 and world % (replicate * peers) == 0:
        shard = world // (replicate * peers)
    if replicate < 1 or shard < 1 or replicate * shard * peers != world:
        others = "".join(
            f" times {key} = {n}" for key, n in zip(keys, degrees, strict=True) if n > 1
        )
        yield Problem(
            "parallelism.data_parallel_replicate_degree",
            f"times data_parallel_shard_degree = {p.data_parallel_shard_degree}{others} does not "
            f"make the {world} ranks that were started; -1 for the shard degree takes what is left",
            ("parallelism.data_parallel_shard_degree", *keys),
        )
        return
    size, data_ranks = t.global_batch_size, replicate * shard
    if size != -1 and (size < 1 or size % (t.local_batch_size * data_ranks)):
        yield Problem(
            "training.global_batch_size",
            f"is not a multiple of training.local_batch_size = {t.local_batch_size} times "
            f"{data_ranks} {'rank' if data_ranks == 1 else 'ranks'}"
            f"{' that read different samples' if peers > 1 else ''}",
            ("training.local_batch_size",),
        )


def model_problems(config: FluxJobConfig, args: FluxModelArgs) -> Iterator[Problem]:
    """Degrees that this model cannot be cut by: tensor and context ranks share out the heads."""
    p, heads = config.parallelism, args.num_heads
    tp, cp = p.tensor_parallel_degree, p.context_parallel_degree
    if min(tp, cp) > 0 and heads % (tp * cp):
        yield Problem(
            "parallelism.tensor_parallel_degree",
            f"times parallelism.context_parallel_degree = {cp} does not divide the {heads} heads "
            f"of model.flavor = {config.model.flavor!r}",
            ("parallelism.context_parallel_degree", "model.flavor"),
        )
