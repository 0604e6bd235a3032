"""Whether the degrees of [parallelism] make the ranks, and the model can be cut that way."""

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.config import Parallelism

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.model import FluxModelArgs

PEERS = {
    "context_parallel_degree": "context",
    "tensor_parallel_degree": "tensor",
    "pipeline_parallel_degree": "pipeline",
}
"""Keys of the ranks that share samples."""


def peer_degree(parallelism: Parallelism) -> int:
    """Ranks that work on the same samples: context, tensor and pipeline."""
    degree = 1
    for key in PEERS:
        degree *= getattr(parallelism, key)
    return degree


def mesh_problems(config: FluxJobConfig, world: int) -> list[str]:
    """Degrees and batch sizes that do not make the `world` ranks that were started."""
    p, t = config.parallelism, config.training
    found = [
        f"parallelism.{key} = {getattr(p, key)} must be at least 1"
        for key in PEERS
        if getattr(p, key) < 1
    ]
    if found:
        return found
    replicate, shard = p.data_parallel_replicate_degree, p.data_parallel_shard_degree
    peers = peer_degree(p)
    if shard == -1 and replicate >= 1 and world % (replicate * peers) == 0:
        shard = world // (replicate * peers)
    if replicate < 1 or shard < 1 or replicate * shard * peers != world:
        others = "".join(
            f" times parallelism.{key} = {getattr(p, key)}" for key in PEERS if getattr(p, key) > 1
        )
        return [
            f"parallelism.data_parallel_replicate_degree = {replicate} times "
            f"data_parallel_shard_degree = {p.data_parallel_shard_degree}{others} does not make "
            f"the {world} ranks that were started; -1 for the shard degree takes what is left"
        ]
    size, data_ranks = t.global_batch_size, replicate * shard
    if size != -1 and (size < 1 or size % (t.local_batch_size * data_ranks)):
        return [
            f"training.global_batch_size = {size} is not a multiple of "
            f"training.local_batch_size = {t.local_batch_size} times {data_ranks} "
            f"{'rank' if data_ranks == 1 else 'ranks'}"
            f"{' that read different samples' if peers > 1 else ''}"
        ]
    return []


def model_problems(config: FluxJobConfig, args: FluxModelArgs) -> list[str]:
    """Degrees that this model cannot be cut by."""
    found = []
    tp = config.parallelism.tensor_parallel_degree
    if tp > 1 and args.num_heads % tp:
        fitting = [n for n in range(2, args.num_heads + 1) if args.num_heads % n == 0]
        found.append(
            f"parallelism.tensor_parallel_degree = {tp} does not divide the {args.num_heads} heads "
            f"of model.flavor = {config.model.flavor!r}; use one of {', '.join(map(str, fitting))}"
        )
    if config.parallelism.enable_async_tensor_parallel:
        found.append(
            "parallelism.enable_async_tensor_parallel = true: its fused matmuls need sequence "
            "parallel activations, which this model does not have; set it to false"
        )
    return found
