"""What test_compile.py looks at, run in a process of its own.

The run-time shape checks that pytest puts into every function (jaxtyping's import hook) cannot be
traced into one graph, so this is started without them:

    PYTHONPATH=tests python tests/distributed/compiled_blocks.py OUTCOMES.pt aot_eager
"""

import ctypes
import sys
from dataclasses import replace
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from helpers import model_inputs, nonzero_model
from ranks import run_ranks
from torch._dynamo.utils import counters

from torchtitan_flux.flow_matching import squared_errors
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.model.initial_values import canonical_name
from torchtitan_flux.parallel.activation_checkpoint import apply_activation_checkpoint
from torchtitan_flux.parallel.compile import compile_blocks, compiled_squared_errors
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.parallelize import shard_model

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


class _HeapUse(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                     "uordblks", "fordblks", "keepcost"]
    ]  # fmt: skip


def heap_in_use() -> int:
    """Bytes that this thread's code has allocated: seen whoever holds them, also compiled code."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _HeapUse
    use = mallinfo2()
    return use.uordblks + use.hblkhd


def outcomes(names: list[str], backend: str | None, ranks: int) -> dict[str, dict[str, Any]]:
    return {name: _outcome(name, backend, ranks) for name in names}


def _outcome(name: str, backend: str | None, ranks: int) -> dict[str, Any]:
    """Loss, whole gradients, graphs and bytes kept for the backward pass, of the second of two
    steps, which must need no new graph."""
    torch._dynamo.reset()
    counters.clear()
    model = nonzero_model(ARGS, seed=5)
    apply_activation_checkpoint(model, preserve_rng_state=False, early_stop=False, **MODES[name])
    errors = squared_errors
    if backend:
        compile_blocks(model, backend)
        errors = compiled_squared_errors(backend)
    mesh = FluxParallelDims(1, ranks, 1, 1, 1, 1, 1, ranks).data_mesh
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


def main() -> None:
    path, which = sys.argv[1:]
    names = list(MODES)
    results: dict[str, Any] = {"eager": run_ranks(1, outcomes, ["none"], None, 1)[0]["none"]}
    if which == "aot_eager":
        results["sizes"] = sizes()
        (results["1 rank"],) = run_ranks(1, outcomes, names, which, 1)
        (results["4 ranks"], *_) = run_ranks(4, outcomes, ["op"], which, 4)
    elif which == "aot_eager 4":
        (results["4 ranks"], *_) = run_ranks(4, outcomes, names, "aot_eager", 4)
    else:
        (results["1 rank"],) = run_ranks(1, outcomes, names, which, 1)
        (results["4 ranks"], *_) = run_ranks(4, outcomes, ["none", "op"], which, 4)
    torch.save(results, path)


if __name__ == "__main__":
    main()
