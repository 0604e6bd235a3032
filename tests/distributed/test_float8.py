"""float8 over ranks, with its weights gathered in float8 or not; checkpoints with and without.

Scales of activations and gradients are each rank's own: ranks that share a batch differ from one
rank as two roundings do, so here they see the same samples.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
import torch.distributed as dist
import torchao.float8  # noqa: F401  (once, before ranks are forked)
from helpers import data_dims, model_inputs, randomize, relative_l2
from ranks import run_ranks
from tiny_run import arguments, train
from torch.distributed.tensor import distribute_tensor
from torchtitan.components.checkpoint import ModelWrapper
from torchtitan.protocols.model_converter import build_model_converters

from torchtitan_flux.checkpoint.folder import step_folder
from torchtitan_flux.checkpoint.storage import read_states
from torchtitan_flux.model import FLAVORS, FluxModel
from torchtitan_flux.model.initial_values import fill_initial_values, initial_rows
from torchtitan_flux.parallel.low_precision_checks import FLOAT8
from torchtitan_flux.parallel.parallelize import shard_model
from torchtitan_flux.startup.load_config import read_config

ARGS = FLAVORS["flux-tiny"]
BATCH = 4
OFF: tuple[str, ...] = ()
TENSORWISE = ("--model.converters", FLOAT8, f"--{FLOAT8}.emulate")
ROWWISE = (*TENSORWISE, f"--{FLOAT8}.recipe_name", "rowwise")
GATHERED = (*TENSORWISE, f"--{FLOAT8}.enable_fsdp_float8_all_gather")
PRECOMPUTED = (*GATHERED, f"--{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp")
KINDS = {
    "tensorwise": TENSORWISE, "rowwise": ROWWISE,
    "gathered in float8": GATHERED, "precomputed scales": PRECOMPUTED,
}  # fmt: skip
MESHES = {"1": (1, 1), "FSDP 2": (1, 2), "DDP 2": (2, 1), "FSDP 4": (1, 4), "HSDP 2x2": (2, 2)}
WEIGHT = "double_blocks.0.img_mlp.0.weight"


@functools.cache
def config_of(argv: tuple[str, ...]) -> Any:
    return read_config(["--job.config_file", "train_configs/flux_digits.toml", *argv])


def run(mesh: str, function: Callable[..., Any], argv: tuple[str, ...], *args: Any) -> list[Any]:
    config_of(argv)  # once, before the ranks are forked
    return run_ranks(math.prod(MESHES[mesh]), function, MESHES[mesh], argv, *args)


def built(mesh: tuple[int, int], argv: tuple[str, ...], meta: bool = False):
    """A model with random values (or on the meta device), converted and sharded as in a run."""
    dims = data_dims(*mesh)
    with torch.device("meta" if meta else "cpu"):
        model = FluxModel(ARGS)
    if not meta:
        randomize(model, seed=5)
    converters = build_model_converters(config_of(argv), dims)
    converters.convert(model)
    shard_model(model, dims.data_mesh, param_dtype=torch.float32)
    return model, converters, dims


def steps(mesh: tuple[int, int], argv: tuple[str, ...]) -> dict:
    """Losses of three steps on one batch that all ranks see; gradients of the first; the type in
    which a weight is gathered."""
    model, converters, dims = built(mesh, argv)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    optimizer.register_step_post_hook(lambda *_: converters.post_optimizer_hook(model))
    came_as: list[str] = []
    model.double_blocks["0"].img_mlp[0].register_forward_hook(  # type: ignore[index]
        lambda module, *_: came_as.append(type(module.weight.data).__name__)
    )
    inputs = model_inputs(ARGS, BATCH, 3, 5, 7, seed=6)
    target = torch.randn(BATCH, 15, ARGS.out_channels, generator=torch.Generator().manual_seed(7))
    elements = target.numel() * dims.data_degree
    losses, gradients = [], {}
    for _ in range(3):
        optimizer.zero_grad()
        out = model(**inputs)
        loss = (out - target).square().sum() / elements
        loss.backward()
        dist.all_reduce(loss.detach_())
        losses.append(loss.item())
        if not gradients:
            gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
        optimizer.step()
    return {"losses": losses, "gradients": gradients, "came as": came_as[-1]}


@functools.cache
def one_rank(argv: tuple[str, ...]) -> dict:
    return run("1", steps, argv)[0]


@pytest.mark.parametrize(("mesh", "kind"), [
    *(("FSDP 2", kind) for kind in KINDS),
    ("DDP 2", "tensorwise"), ("HSDP 2x2", "gathered in float8"),
])  # fmt: skip
def test_ranks_that_see_the_same_samples_compute_what_one_does(mesh, kind):
    """Scales are of whole weights, not of shards; one left behind by its weight would show from
    the second step on."""
    reference = one_rank(ROWWISE if kind == "rowwise" else TENSORWISE)
    for result in run(mesh, steps, KINDS[kind]):
        assert result["losses"] == pytest.approx(reference["losses"], rel=1e-6)
        for name, gradient in reference["gradients"].items():
            assert relative_l2(result["gradients"][name], gradient) <= 1e-5, name
        gathered = kind in ("gathered in float8", "precomputed scales")
        assert result["came as"] == ("Float8TrainingTensor" if gathered else "Tensor")


def initial(mesh: tuple[int, int], argv: tuple[str, ...]) -> tuple[str, dict[str, torch.Tensor]]:
    model, _, _ = built(mesh, argv, meta=True)
    model.to_empty(device="cpu")
    fill_initial_values(model, seed=9)
    local = model.get_parameter(WEIGHT).to_local()
    states = ModelWrapper(model).state_dict()
    return type(local.data).__name__, {name: p.full_tensor() for name, p in states.items()}


@pytest.mark.parametrize(("mesh", "argv"), [
    *((mesh, OFF) for mesh in MESHES), ("FSDP 2", GATHERED), ("HSDP 2x2", GATHERED),
])  # fmt: skip
def test_initial_values_are_the_same_on_every_mesh(mesh, argv):
    for kind, values in run(mesh, initial, argv):
        assert kind == ("WeightWithDynamicFloat8CastTensor" if argv else "Tensor")
        assert set(values) == {name for name, _ in FluxModel(ARGS).named_parameters()}
        for name, value in values.items():
            shape = tuple(value.shape)
            assert torch.equal(value, initial_rows(9, name, shape, 0, shape[0])), name


def far_from_the_start(trainer) -> None:
    """Random weights (at the DiT start float8 changes next to nothing), and eyes on the scales."""
    model = trainer.model_parts[0]
    values = dict(randomize(FluxModel(trainer.model_args), 3).named_parameters())
    for name, p in model.named_parameters():
        p.detach().copy_(distribute_tensor(values[name].detach(), p.device_mesh, p.placements))
    weight = model.get_parameter(WEIGHT)
    gathered = hasattr(weight.to_local(), "fsdp_pre_all_gather")

    def look(*_) -> None:
        assert not gathered or weight._local_tensor._precomputed_scale is not None

    trainer.optimizers.register_step_post_hook(look)


def test_a_float8_run_continues_exactly_and_also_without_float8(tmp_path):
    """Through the trainer; the optimizer's state travels too."""
    short = ("--training.steps", "4", "--checkpoint.interval", "2", "--optimizer.lr", "1e-3")
    argv = arguments(tmp_path, 4, *short)
    runs = run_ranks(2, train, [*argv, *PRECOMPUTED], far_from_the_start)
    assert [run.error for run in runs] == ["", ""]
    last = step_folder(tmp_path / "checkpoint", 4)
    assert not any(b"torchao" in path.read_bytes() for path in last.iterdir())
    for name, value in read_states(last).items():
        if name in runs[0].weights:
            assert torch.equal(value, runs[0].weights[name]), name
    back = ("--checkpoint.load_step", "2")
    again = run_ranks(2, train, [*argv, *PRECOMPUTED, *back], far_from_the_start)
    assert again[0].losses == {step: runs[0].losses[step] for step in (3, 4)}
    (plain,) = run_ranks(1, train, arguments(tmp_path, 8, *short, *back))
    assert plain.error == ""
    assert plain.losses == pytest.approx(again[0].losses, rel=2e-2)
    assert plain.losses != again[0].losses
