"""Meshes: torchtitan's, with the data-parallel dimensions kept also where their size is one."""

from dataclasses import dataclass

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.config import Parallelism
from torchtitan.distributed import ParallelDims


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
