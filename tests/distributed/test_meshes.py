"""Meshes beside the twins' arithmetic: reductions, casts, pictures and validation."""

import math
from dataclasses import replace

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
import torch.distributed as dist
from helpers import data_dims, model_inputs, nonzero_model, relative_l2
from ranks import run_ranks
from tiny_run import painted_and_measured

from torchtitan_flux.model import FLAVORS
from torchtitan_flux.parallel.parallelize import shard_model

ARGS = FLAVORS["flux-tiny"]
BATCH = 4


def all_reduces(with_replicas: bool) -> int:
    """Of a backward pass, where there is one replica."""
    dims = data_dims(1, dist.get_world_size())
    mesh = dims.get_mesh(["dp_replicate", "fsdp"]) if with_replicas else dims.data_mesh
    model = nonzero_model(ARGS, seed=5)
    shard_model(model, mesh, param_dtype=torch.float32)
    asked, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **more: asked.append(1) or all_reduce(*args, **more)
    model(**model_inputs(ARGS, BATCH, 3, 5, 7, seed=6)).square().mean().backward()
    return len(asked)


def test_gradients_are_not_reduced_over_a_dimension_of_size_one():
    """As FSDP2 would over one replica."""
    assert run_ranks(2, all_reduces, True)[0] > 0
    assert run_ranks(2, all_reduces, False) == [0, 0]


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
