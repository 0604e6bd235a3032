"""Every parallelism computes what one device computes: loss, gradients, clip norm, weights.

Reference: the bare model in float64. Float32 alone is 1.4e-6 from it in its worst gradient.
"""

import functools
import statistics
from collections.abc import Callable
from dataclasses import replace

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
from helpers import relative_l2
from ranks import run_ranks
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torchtitan.distributed import NoParallel
from twins import (
    Case,
    Twin,
    assert_as_on_one_device,
    assert_mutant_is_seen,
    bare_twin,
    run_twin,
    tiers,
)

from torchtitan_flux.parallel import context, tensor
from torchtitan_flux.parallel.dims import FluxParallelDims

UNEVEN = {"cols": 5, "text": 7}
"""3 x 5 image and 7 text tokens: neither divides by 2 or 4."""

CASES = {
    "one rank": Case(),
    "one rank, accumulation": Case(microbatches=4, ac=("full",), guidance=True),
    "FSDP 2": Case(shard=2, guidance=True),
    "FSDP 2, accumulation": Case(shard=2, microbatches=2, ac=("full",)),
    "FSDP 4": Case(shard=4, ac=("selective", "op")),
    "FSDP 4, accumulation": Case(shard=4, batch=8, microbatches=2),
    "DDP 2": Case(replicate=2),
    "DDP 2, accumulation": Case(replicate=2, microbatches=2),
    "HSDP 2x2": Case(replicate=2, shard=2, ac=("selective", "2")),
    "HSDP 2x2, accumulation": Case(replicate=2, shard=2, batch=8, microbatches=2),
    "CP 2": Case(cp=2, ac=("full",)),
    "CP 4": Case(cp=4),
    "CP 2, uneven": Case(cp=2, guidance=True, **UNEVEN),
    "CP 4, uneven": Case(cp=4, ac=("selective", "op"), **UNEVEN),
    "TP 2": Case(tp=2, ac=("full",), guidance=True),
    "TP 4": Case(tp=4),
    "FSDP 2 x TP 2, accumulation": Case(shard=2, tp=2, microbatches=2, ac=("selective", "op")),
    "HSDP 2x2 x CP 2": Case(replicate=2, shard=2, cp=2, **UNEVEN),
    "TP 2 x CP 2 x DP 2": Case(replicate=2, tp=2, cp=2, **UNEVEN),
    "TP 2 x CP 2 x FSDP 2": Case(shard=2, tp=2, cp=2),
}
SLOW = ("TP 4", "HSDP 2x2 x CP 2")
LONG = ("FSDP 4, accumulation", "HSDP 2x2, accumulation", "CP 4",
        "TP 2 x CP 2 x FSDP 2")  # fmt: skip


@pytest.mark.parametrize("case", tiers(CASES, SLOW, LONG))
def test_a_mesh_computes_what_one_device_computes(case):
    assert_as_on_one_device(case)


# ---- bf16 --------------------------------------------------------------------------------------

SEEDS = (5, 15, 25, 35, 45)
BF16 = {
    "FSDP 2": Case(shard=2),
    "DDP 2": Case(replicate=2),
    "HSDP 2x2": Case(replicate=2, shard=2),
    "CP 2": Case(cp=2),
    "CP 4, uneven": Case(cp=4, **UNEVEN),
    "TP 2": Case(tp=2),
    "TP 4": Case(tp=4),
    "PP 2": Case(pp=2),
    "PP 2 x FSDP 2": Case(pp=2, shard=2, batch=8),
    "TP 2 x CP 2 x DP 2": Case(replicate=2, tp=2, cp=2),
}


def vectors(twin: Callable[[Case], Twin], case: Case) -> list[Tensor]:
    """For each seed all gradients as one vector."""
    twins = [twin(replace(case, steps=1, seed=seed)) for seed in SEEDS]
    return [torch.cat([t.grads[n].flatten().double() for n in sorted(t.grads)]) for t in twins]


@functools.cache
def median_distance(case: Case) -> float:
    """Relative L2 distance of bf16's to the float64 gradient."""
    in_bf16 = replace(case, dtype="bfloat16")
    (gradients, *_) = run_ranks(case.ranks, vectors, run_twin, in_bf16)
    return statistics.median(map(relative_l2, gradients, exact(case.alone)))


@functools.cache
def exact(case: Case) -> list[Tensor]:
    return vectors(bare_twin, case)


# a mesh takes up to a minute
@pytest.mark.parametrize("case", tiers(BF16, ("CP 2",), tuple(BF16.keys() - {"CP 2"})))
def test_bf16_is_no_further_from_the_truth_on_many_ranks(case):
    alone = median_distance(case.alone)
    assert 1e-3 < alone < 2e-2, "bf16 has three digits"
    assert median_distance(case) <= 1.1 * alone


# ---- what the twins see: each parallelism with one thing wrong -------------------------------


def not_exchanged(self, x):
    return x


MUTANTS = {
    "CP: all-to-all left out": (Case(cp=2), context.ContextAttention, "_exchange", not_exchanged),
    "CP: pads are attended to": (Case(cp=2, **UNEVEN), context, "_valid_index", lambda *_: None),
    "TP: QK-norm as if it saw all heads": (Case(tp=2), tensor, "_per_head_norm", NoParallel),
    "FSDP: gradients averaged, as unless told otherwise": (
        Case(shard=2), FSDPModule, "set_gradient_divide_factor", lambda *_: None),
    "DDP: replicas never meet": (
        Case(replicate=2), FluxParallelDims, "data_mesh",
        property(lambda dims: dims.get_mesh("fsdp"))),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_seen(name):
    assert_mutant_is_seen(*MUTANTS[name])
