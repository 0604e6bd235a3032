"""One path for one rank, DDP, FSDP and HSDP: equal gradients, text features and pictures."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers import model_inputs, nonzero_model, relative_l2
from ranks import run_ranks
from tiny_run import painted_and_measured

from torchtitan_flux.encoders.text import T5Encoder
from torchtitan_flux.model import FLAVORS, FluxModel
from torchtitan_flux.model.initial_values import initial_rows
from torchtitan_flux.parallel.activation_checkpoint import apply_activation_checkpoint
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.initial_values import fill_initial_values
from torchtitan_flux.parallel.parallelize import shard_model, shard_text_encoder

ARGS = FLAVORS["flux-tiny"]
BATCH = 4
MESHES = {"1": (1, 1), "FSDP 2": (1, 2), "DDP 2": (2, 1), "FSDP 4": (1, 4), "HSDP 2x2": (2, 2)}


def dims_of(replicate: int, shard: int) -> FluxParallelDims:
    return FluxParallelDims(replicate, shard, 1, 1, 1, 1, 1, replicate * shard)


def gradients(
    mesh: tuple[int, int], microbatches: int, ac: str, guidance: bool, replicas_meet: bool = True
) -> dict:
    """Loss, full gradients and clip norm of one step, on this rank's share of a fixed batch.

    In float64, so that what differs is an error and not rounding (rope stays in float32).
    """
    args = replace(ARGS, guidance_embed=guidance)
    dims = dims_of(*mesh)
    model = nonzero_model(args, seed=5).double()
    apply_activation_checkpoint(model, ac, preserve_rng_state=False)
    double = torch.float64
    device_mesh = dims.data_mesh if replicas_meet else dims.get_mesh("fsdp")
    shard_model(model, device_mesh, param_dtype=double, reduce_dtype=double)
    inputs = {name: x.double() for name, x in model_inputs(args, BATCH, 3, 5, 7, seed=6).items()}
    target = torch.randn(BATCH, 15, args.out_channels, generator=torch.Generator().manual_seed(7))
    share = BATCH // dims.data_degree
    piece = share // microbatches
    loss = torch.zeros((), dtype=double)
    for m in range(microbatches):
        model.set_requires_gradient_sync(m == microbatches - 1)
        at = slice(dims.data_rank * share + m * piece, dims.data_rank * share + (m + 1) * piece)
        out = model(**{name: x[at] for name, x in inputs.items()})
        part = (out - target[at]).square().sum() / target.numel()
        part.backward()
        loss += part.detach()
    dist.all_reduce(loss)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).full_tensor()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return {"loss": float(loss), "norm": float(norm), "grads": grads}


@functools.cache
def one_rank(guidance: bool) -> dict:
    return run_ranks(1, gradients, (1, 1), 1, "none", guidance)[0]


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize(("mesh", "microbatches", "ac"), [
    ("1", 4, "none"), ("1", 1, "full"), ("FSDP 2", 1, "none"), ("FSDP 2", 2, "full"),
    ("DDP 2", 1, "none"), ("DDP 2", 2, "none"), ("FSDP 4", 1, "full"), ("HSDP 2x2", 1, "none"),
])  # fmt: skip
def test_gradients_equal_one_rank(mesh, microbatches, ac, guidance):
    reference = one_rank(guidance)
    degree = MESHES[mesh][0] * MESHES[mesh][1]
    for result in run_ranks(degree, gradients, MESHES[mesh], microbatches, ac, guidance):
        assert result["loss"] == pytest.approx(reference["loss"], rel=1e-9)
        assert result["norm"] == pytest.approx(reference["norm"], rel=1e-7)
        for name, grad in reference["grads"].items():
            name_here = name if ac == "none" else _checkpointed(name)
            assert grad.abs().max() > 1e-6, f"{name} is not tested"
            worst = (result["grads"][name_here] - grad).abs().max() / grad.abs().max()
            assert worst <= 1e-6, name


def _checkpointed(name: str) -> str:
    """A parameter's name under the checkpoint wrapper."""
    if not name.startswith(("double_blocks.", "single_blocks.")):
        return name
    group, number, rest = name.split(".", 2)
    return f"{group}.{number}._checkpoint_wrapped_module.{rest}"


def test_replicas_that_never_meet_are_seen():
    """The mutation: a mesh without its replicas, as torchtitan's FLUX has it; gradients are off."""
    reference = one_rank(False)
    (result, _) = run_ranks(2, gradients, MESHES["DDP 2"], 1, "none", False, False)
    name = "img_in.weight"
    off = (result["grads"][name] - reference["grads"][name]).abs().max()
    assert off > 0.1 * reference["grads"][name].abs().max()


def reduced(shard: int, with_replicas: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """All-reduces of a backward pass, and its full gradients, where there is one replica."""
    dims = dims_of(1, shard)
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
        shard_model(model, dims_of(1, 1).data_mesh, param_dtype=torch.bfloat16)
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


def filled(mesh: tuple[int, int]) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = FluxModel(ARGS)
    shard_model(model, dims_of(*mesh).data_mesh, param_dtype=torch.float32)
    model.to_empty(device="cpu")
    fill_initial_values(model, seed=9)
    return {name: p.full_tensor() for name, p in model.named_parameters()}


@pytest.mark.parametrize("mesh", MESHES)
def test_initial_values_are_the_same_on_every_mesh(mesh):
    for values in run_ranks(MESHES[mesh][0] * MESHES[mesh][1], filled, MESHES[mesh]):
        for name, value in values.items():
            shape = tuple(value.shape)
            assert torch.equal(value, initial_rows(9, name, shape, 0, shape[0])), name


def text_features(sharded: bool) -> torch.Tensor:
    encoder = T5Encoder("torchtitan_flux/assets/tiny/t5")
    if sharded:
        shard_text_encoder(encoder, dims_of(1, 2).data_mesh)
        local = next(encoder.blocks()[0].parameters()).to_local()
        assert local.numel() < next(encoder.blocks()[0].parameters()).numel()
    return encoder(torch.arange(24).view(3, 8))


def test_sharded_t5_gives_the_same_features():
    (whole,) = run_ranks(1, text_features, False)
    for features in run_ranks(2, text_features, True):
        torch.testing.assert_close(features, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.long
def test_pictures_and_validation_do_not_depend_on_the_ranks(tmp_path):
    """Five pictures and 360 items over 4 ranks: neither divides."""
    argv = [
        "--job.config_file", "train_configs/flux_digits.toml", "--job.dump_folder", str(tmp_path),
        "--debug.seed", "1", "--validation.local_batch_size", "50",
        "--training.local_batch_size", "4", "--sampling.denoising_steps", "3",
    ]  # fmt: skip
    ((images, loss),) = run_ranks(1, painted_and_measured, argv, 1)
    assert images.shape == (5, 1, 8, 8)
    assert images.std(dim=0).mean() > 1e-2, "all pictures are alike: nothing would be compared"
    for ranks, replicate in ((2, 1), (4, 2)):
        for other_images, other_loss in run_ranks(ranks, painted_and_measured, argv, replicate):
            torch.testing.assert_close(other_images, images, rtol=1e-5, atol=1e-5)
            assert other_loss == pytest.approx(loss, rel=1e-6)
