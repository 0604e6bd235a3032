"""Meshes beside the twins' arithmetic: reductions, casts, sharded T5, pictures and validation."""

import math
from dataclasses import replace

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
import torch.distributed as dist
from helpers import data_dims, model_inputs, nonzero_model, relative_l2
from ranks import run_ranks
from tiny_run import painted_and_measured

from torchtitan_flux.collectives import all_gather_rows, shard_rows
from torchtitan_flux.encoders.text import T5Encoder
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.parallel.parallelize import shard_model, shard_text_encoder

ARGS = FLAVORS["flux-tiny"]
BATCH = 4


def reduced(shard: int, with_replicas: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """All-reduces of a backward pass, and its full gradients, where there is one replica."""
    dims = data_dims(1, shard)
    mesh = dims.get_mesh(["dp_replicate", "fsdp"]) if with_replicas else dims.data_mesh
    model = nonzero_model(ARGS, seed=5)
    shard_model(model, mesh, param_dtype=torch.float32)
    asked, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **more: asked.append(1) or all_reduce(*args, **more)
    try:
        model(**model_inputs(ARGS, BATCH, 3, 5, 7, seed=6)).square().mean().backward()
    finally:
        dist.all_reduce = all_reduce
    return len(asked), {name: p.grad.full_tensor() for name, p in model.named_parameters()}


@pytest.mark.parametrize("shard", [1, 2])
def test_gradients_are_not_reduced_over_a_dimension_of_size_one(shard):
    """The same bit by bit as with the reductions that FSDP2 makes over one replica."""
    ((with_them, expected), *_) = run_ranks(shard, reduced, shard, True)
    ((without, result), *_) = run_ranks(shard, reduced, shard, False)
    assert without == 0 < with_them
    assert result.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(result[name], grad), name


def bf16_gradients(through_fsdp: bool) -> tuple[dict[str, torch.Tensor], list[torch.dtype]]:
    """Gradients of a model that computes in bf16: by shard_model, or as plain bf16 weights."""
    args = replace(ARGS, guidance_embed=True)
    model = nonzero_model(args, seed=5)
    if through_fsdp:
        shard_model(model, data_dims(1, 1).data_mesh, param_dtype=torch.bfloat16)
    else:
        model.bfloat16()
    dtypes: list[torch.dtype] = []
    block = model.single_blocks["0"]
    block.attention.register_forward_hook(
        lambda module, inputs, out: dtypes.extend([inputs[3].dtype, out.dtype])
    )
    inputs = model_inputs(args, BATCH, 3, 5, 7, seed=6)
    inputs["timesteps"] = torch.tensor([0.1234567, 0.3456789, 0.5678901, 0.9012345])
    inputs["img_ids"] = inputs["img_ids"] + 100.7  # not exact in bf16
    model(**inputs).float().square().mean().backward()
    whole = (lambda g: g.full_tensor()) if through_fsdp else (lambda g: g)
    return {n: whole(p.grad).float() for n, p in model.named_parameters()}, dtypes


def test_bf16_compute_leaves_times_ids_and_rope_in_float32():
    """fully_shard must not cast inputs: with cast_forward_inputs=True gradients are 40 % off."""
    ((reference, _),) = run_ranks(1, bf16_gradients, False)
    ((result, dtypes),) = run_ranks(1, bf16_gradients, True)
    assert dtypes == [torch.float32, torch.bfloat16]  # rope table, what attention gives
    for name, grad in reference.items():
        assert relative_l2(result[name], grad) <= 1e-2, name


def text_features(sharded: bool) -> torch.Tensor:
    encoder = T5Encoder("torchtitan_flux/assets/tiny/t5")
    if sharded:
        shard_text_encoder(encoder, data_dims(1, 2).data_mesh)
        local = next(encoder.blocks()[0].parameters()).to_local()
        assert local.numel() < next(encoder.blocks()[0].parameters()).numel()
    return encoder(torch.arange(24).view(3, 8))


def test_sharded_t5_gives_the_same_features():
    (whole,) = run_ranks(1, text_features, False)
    for features in run_ranks(2, text_features, True):
        torch.testing.assert_close(features, whole, rtol=1e-6, atol=1e-6)


DRAWN_ON = [
    {"context_parallel": 4},
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
    """Over 4 context ranks 10 text tokens do not divide."""
    argv, (images, loss) = drawn
    words = [w for name, n in mesh.items() for w in (f"--parallelism.{name}_degree", str(n))]
    ranks = math.prod(mesh.values())
    for other_images, other_loss in run_ranks(ranks, painted_and_measured, [*argv, *words]):
        torch.testing.assert_close(other_images, images, rtol=1e-5, atol=1e-5)
        assert other_loss == pytest.approx(loss, rel=1e-6)


def dealt(rows: int) -> tuple[list[int], list[int]]:
    group = torch.distributed.group.WORLD
    batch = torch.arange(10.0, 10.0 + rows)[:, None]
    own = shard_rows(batch, group)
    return own[:, 0].tolist(), all_gather_rows(own * 2, rows, group)[:, 0].tolist()


@pytest.mark.parametrize(("rows", "share"), [(6, 2), (4, 2), (1, 1)])
def test_each_peer_encodes_a_share_and_all_have_the_whole(rows, share):
    results = run_ranks(3, dealt, rows)
    for own, joined in results:
        assert len(own) == share
        assert joined == [2 * (10.0 + i) for i in range(rows)]
    assert {row for own, _ in results for row in own} == {10.0 + i for i in range(rows)}
