"""Pictures and validation on any mesh; what ranks that share samples encode."""

import math

import pytest
import torch
from ranks import run_ranks
from tiny_run import painted_and_measured

from torchtitan_flux.parallel.replicated_rows import Peers

DRAWN_ON = [
    {"context_parallel": 3},
    {"context_parallel": 2, "tensor_parallel": 2},
    pytest.param({"data_parallel_shard": 2}, marks=pytest.mark.long),
    pytest.param({"data_parallel_replicate": 2, "data_parallel_shard": 2}, marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """On one rank: five pictures and 360 items, which no number of data ranks divides."""
    argv = [
        "--job.config_file", "train_configs/flux_digits.toml",
        "--job.dump_folder", str(tmp_path_factory.mktemp("drawn")),
        "--debug.seed", "1", "--validation.local_batch_size", "50",
        "--training.local_batch_size", "4", "--sampling.denoising_steps", "3",
        "--encoder.max_t5_encoding_len", "10",
    ]  # fmt: skip
    (one_rank,) = run_ranks(1, painted_and_measured, argv)
    assert one_rank[0].shape == (5, 1, 8, 8)
    assert one_rank[0].std(dim=0).mean() > 1e-2, "all pictures are the same: an empty comparison"
    return argv, one_rank


@pytest.mark.parametrize("mesh", DRAWN_ON, ids=" ".join)
def test_pictures_and_validation_do_not_depend_on_the_mesh(drawn, mesh):
    """Over 3 context ranks: neither 10 text tokens, nor 16 image tokens, nor 4 heads divide."""
    argv, (images, loss) = drawn
    words = [w for name, n in mesh.items() for w in (f"--parallelism.{name}_degree", str(n))]
    ranks = math.prod(mesh.values())
    for other_images, other_loss in run_ranks(ranks, painted_and_measured, [*argv, *words]):
        torch.testing.assert_close(other_images, images, rtol=1e-5, atol=1e-5)
        assert other_loss == pytest.approx(loss, rel=1e-6)


def dealt(rows: int) -> tuple[list[int], list[int]]:
    peers = Peers(torch.distributed.group.WORLD)
    batch = torch.arange(10.0, 10.0 + rows)[:, None]
    own = peers.own(batch)
    return own[:, 0].tolist(), peers.join(own * 2, rows)[:, 0].tolist()


@pytest.mark.parametrize(("rows", "share"), [(6, 2), (4, 2), (1, 1)])
def test_each_peer_encodes_a_share_and_all_have_the_whole(rows, share):
    results = run_ranks(3, dealt, rows)
    for own, joined in results:
        assert len(own) == share
        assert joined == [2 * (10.0 + i) for i in range(rows)]
    assert {row for own, _ in results for row in own} == {10.0 + i for i in range(rows)}
