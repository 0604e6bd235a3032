"""Compiled blocks and loss give what eager ones give, from few graphs, with each way of
recomputing."""

import ctypes
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from helpers import data_dims, model_inputs, nonzero_model
from programs import run_program
from ranks import run_ranks
from torch._dynamo.utils import counters

from torchtitan_flux.flow_matching import squared_errors
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.model.initial_values import canonical_name
from torchtitan_flux.parallel.activation_checkpoint import apply_activation_checkpoint
from torchtitan_flux.parallel.parallelize import compile_blocks, shard_model

ARGS = replace(FLAVORS["flux-tiny"], hidden_size=96, num_heads=4, guidance_embed=True)
BATCH, ROWS, COLS, TEXT = 4, 8, 12, 17
MODES: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "full": {"mode": "full"},
    "full, offloaded": {"mode": "full", "offload_inputs": True},
    "every 2nd": {"mode": "selective", "selective_ac_option": "2"},
    "op": {"mode": "selective", "selective_ac_option": "op"},
    "budget 0.5": {"mode": "memory_budget", "memory_budget": 0.5},
    "budget 0": {"mode": "memory_budget", "memory_budget": 0.0},
}


class HeapUse(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def heap_in_use() -> int:
    """Bytes that this thread's code has allocated: seen whoever holds them, also compiled code."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = HeapUse
    use = mallinfo2()
    return use.uordblks + use.hblkhd


def outcome(name: str, compiled: bool, ranks: int) -> dict[str, Any]:
    """Loss, whole gradients, graphs and bytes kept for the backward pass, of the second of two
    steps, which must need no new graph."""
    torch._dynamo.reset()
    counters.clear()
    model = nonzero_model(ARGS, seed=5)
    apply_activation_checkpoint(model, preserve_rng_state=False, early_stop=False, **MODES[name])
    errors = squared_errors
    if compiled:
        compile_blocks(model, "aot_eager")
        errors = torch.compile(squared_errors, backend="aot_eager", fullgraph=True, dynamic=False)
    mesh = data_dims(1, ranks).data_mesh
    shard_model(model, mesh, param_dtype=torch.float32)
    share = slice(dist.get_rank() * BATCH // ranks, (dist.get_rank() + 1) * BATCH // ranks)
    inputs = model_inputs(ARGS, BATCH, ROWS, COLS, TEXT, seed=6)
    inputs = {key: value[share] for key, value in inputs.items()}
    rng = torch.Generator().manual_seed(7)
    target = torch.randn(BATCH, ROWS * COLS, ARGS.out_channels, generator=rng)

    def forward() -> torch.Tensor:
        return errors(model(**inputs), target[share]).sum() / target.numel()

    forward().backward()
    graphs = counters["stats"]["unique_graphs"]
    model.zero_grad()
    before = heap_in_use()
    with torch.compiler.set_stance("fail_on_recompile"):
        loss = forward()
        saved = heap_in_use() - before
        loss.backward()
    total = loss.detach()
    dist.all_reduce(total)
    grads = {canonical_name(key): p.grad.full_tensor() for key, p in model.named_parameters()}
    return {"loss": float(total), "grads": grads, "graphs": graphs, "saved": saved}


def measured(names: list[str], compiled: bool, ranks: int) -> dict[str, dict[str, Any]]:
    return {name: outcome(name, compiled, ranks) for name in names}


def sizes() -> list[int]:
    """Graphs after each call of a model of full depth; the second half repeats the first."""
    args = replace(
        ARGS, depth=19, depth_single_blocks=38, hidden_size=32, num_heads=2, axes_dim=(4, 6, 6)
    )
    model = nonzero_model(args, seed=5)
    compile_blocks(model, "eager")
    # (training?, batch, rows, columns): training, then validation whose last batch is smaller,
    # sampling, a batch of one, and more image sizes than torch's own limit of 8 graphs
    calls = [(True, 4, 4, 4), (False, 6, 4, 4), (False, 3, 4, 4), (False, 1, 4, 4)]
    calls += [(True, 4, rows, 5) for rows in range(1, 7)]
    after = []
    for number, (training, b, rows, cols) in enumerate(calls * 2):
        inputs = model_inputs(args, b, rows, cols, 7, seed=6)
        stance = "default" if number < len(calls) else "fail_on_recompile"
        with torch.compiler.set_stance(stance), torch.set_grad_enabled(training):
            out = model(**inputs)
            if training:
                out.square().sum().backward()
        after.append(counters["stats"]["unique_graphs"])
    return after


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Any]:
    """`main` in a process of its own: pytest's run-time shape checks (jaxtyping's import hook)
    cannot be traced into one graph."""
    path = tmp_path_factory.mktemp("compiled") / "outcomes.pt"
    run_program("-W", "ignore", Path(__file__).resolve(), path)
    return torch.load(path)


def assert_as_eager(results: dict[str, Any], ranks: str) -> None:
    """Also few graphs: two for the blocks and one for the loss; fully_shard makes other classes of
    those blocks that have no wrapper, which are graphs of their own where only some have one."""
    eager = results["eager"]
    for mode, found in results[ranks].items():
        assert found["loss"] == pytest.approx(eager["loss"], rel=1e-5)
        assert found["grads"].keys() == eager["grads"].keys()
        for name, grad in eager["grads"].items():
            assert grad.abs().max() > 1e-6, f"{name} is not tested"
            assert (found["grads"][name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name
        assert found["graphs"] == (5 if mode == "every 2nd" else 3), mode


@pytest.mark.parametrize("ranks", ["1 rank", "4 ranks"])
def test_compiled_is_eager(outcomes, ranks):
    assert_as_eager(outcomes, ranks)


def test_recomputation_saves_memory_in_compiled_blocks_too(outcomes):
    saved = {name: outcome["saved"] for name, outcome in outcomes["1 rank"].items()}
    for least in ("full", "full, offloaded", "budget 0"):
        assert saved[least] < 0.15 * saved["none"], least
    assert saved["full"] < 0.4 * saved["op"] < 0.3 * saved["none"]
    assert saved["full"] < saved["every 2nd"] < 0.7 * saved["none"]
    assert saved["budget 0"] < 0.5 * saved["budget 0.5"] < 0.4 * saved["none"]


def test_a_size_needs_two_graphs_whatever_the_depth(outcomes):
    """19 double and 38 single blocks, ten sizes, training and evaluation; then all of it again."""
    first, again = outcomes["sizes"][:10], outcomes["sizes"][10:]
    assert first == [2 * (number + 1) for number in range(10)]
    assert again == [20] * 10


def main() -> None:
    results: dict[str, Any] = {"eager": run_ranks(1, measured, ["none"], False, 1)[0]["none"]}
    (results["1 rank"],) = run_ranks(1, measured, list(MODES), True, 1)
    (results["4 ranks"], *_) = run_ranks(4, measured, ["none", "op"], True, 4)
    results["sizes"] = sizes()
    torch.save(results, sys.argv[1])


if __name__ == "__main__":
    main()
