"""Whole runs on meshes whose ranks share samples: the trajectory of one rank, and back again."""

import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_run import arguments, loss_series, painted_and_measured, worst

from torchtitan_flux.parallel.replicated_rows import all_gather_rows, shard_rows

SHORT = ("--training.steps", "6", "--checkpoint.interval", "3")
MESHES = {
    "CP 2": {"context": 2},
    "CP 2 x TP 2": {"context": 2, "tensor": 2},
    "FSDP 2 x TP 2": {"data_parallel_shard": 2, "tensor": 2},
}


def degrees(mesh: dict[str, int]) -> list[str]:
    keys = {name if "data" in name else f"{name}_parallel": n for name, n in mesh.items()}
    return [w for name, n in keys.items() for w in (f"--parallelism.{name}_degree", str(n))]


def ranks(mesh: dict[str, int]) -> int:
    return int(torch.tensor(list(mesh.values())).prod())


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    dump = tmp_path_factory.mktemp("one")
    return loss_series(1, arguments(dump, 8, *SHORT)), dump


def from_step_3(dump: Path, copy: Path) -> Path:
    """A copy of a finished run whose last checkpoint is that of step 3."""
    shutil.copytree(dump, copy)
    shutil.rmtree(copy / "checkpoint/step-6")
    return copy


@pytest.mark.parametrize(
    "name",
    ["CP 2 x TP 2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("CP 2", "FSDP 2 x TP 2"))],
)
def test_a_run_is_that_of_one_rank_and_continues_on_one(one_rank, tmp_path, name):
    series, _ = one_rank
    mesh, dump = MESHES[name], tmp_path / "mesh"
    local = 8 // mesh.get("data_parallel_shard", 1)
    on_mesh = loss_series(ranks(mesh), arguments(dump, local, *SHORT, *degrees(mesh)))
    assert list(on_mesh) == list(series)
    assert worst(on_mesh, series) <= 1e-5
    rest = loss_series(1, arguments(from_step_3(dump, tmp_path / "rest"), 8, *SHORT))
    assert list(rest) == [4, 5, 6]
    assert worst(rest, series) <= 1e-5


@pytest.mark.slow
def test_a_run_of_one_rank_continues_on_a_mesh(one_rank, tmp_path):
    series, dump = one_rank
    argv = arguments(from_step_3(dump, tmp_path / "rest"), 8, *SHORT)
    rest = loss_series(4, [*argv, *degrees(MESHES["CP 2 x TP 2"])])
    assert list(rest) == [4, 5, 6]
    assert worst(rest, series) <= 1e-5


def test_pictures_and_validation_do_not_depend_on_the_mesh(tmp_path):
    """10 text tokens and 16 image tokens over 3 context ranks: neither divides, nor do 4 heads."""
    argv = [
        "--job.config_file", "train_configs/flux_digits.toml", "--job.dump_folder", str(tmp_path),
        "--debug.seed", "1", "--validation.local_batch_size", "64", "--validation.steps", "1",
        "--training.local_batch_size", "4", "--sampling.denoising_steps", "3",
        "--encoder.max_t5_encoding_len", "10",
    ]  # fmt: skip
    ((images, loss),) = run_ranks(1, painted_and_measured, argv, 1)
    for mesh in ({"context": 3}, {"context": 2, "tensor": 2}):
        on_mesh = [*argv, *degrees(mesh)]
        for other_images, other_loss in run_ranks(ranks(mesh), painted_and_measured, on_mesh, 1):
            torch.testing.assert_close(other_images, images, rtol=1e-5, atol=1e-5)
            assert other_loss == pytest.approx(loss, rel=1e-6)


def dealt(rows: int) -> tuple[list[int], list[int]]:
    peers, batch = torch.distributed.group.WORLD, torch.arange(10.0, 10.0 + rows)[:, None]
    own = shard_rows(batch, peers)
    return own[:, 0].tolist(), all_gather_rows(own * 2, rows, peers)[:, 0].tolist()


@pytest.mark.parametrize(("rows", "share"), [(6, 2), (4, 2), (1, 1)])
def test_each_peer_encodes_a_share_and_all_have_the_whole(rows, share):
    results = run_ranks(3, dealt, rows)
    for own, joined in results:
        assert len(own) == share
        assert joined == [2 * (10.0 + i) for i in range(rows)]
    assert {row for own, _ in results for row in own} == {10.0 + i for i in range(rows)}
