"""Whether the degrees of [parallelism] make the ranks, and the model can be cut that way."""

from collections.abc import Iterator

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.config import Parallelism

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import Problem, violated
from torchtitan_flux.config.schema import get
from torchtitan_flux.model import FluxModelArgs

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
