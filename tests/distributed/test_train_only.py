"""Training some of the parameters: those that are named change, the others do not."""

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
from ranks import run_ranks
from tiny_run import arguments
from torch import Tensor

from torchtitan_flux.startup.load_config import load_config
from torchtitan_flux.training.trainer import FluxTrainer

ONLY = "img_attn.qkv_by_head"
MESHES = {
    "one rank": (1, []),
    "FSDP 2": (2, ["--parallelism.data_parallel_shard_degree", "2"]),
    "TP 2": (2, ["--parallelism.tensor_parallel_degree", "2"]),
}


def run(argv: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor], set[str], set[str]]:
    """Weights before and after, and what the optimizer and the average have states of."""
    trainer = FluxTrainer(load_config(argv))
    (model,) = trainer.model_parts
    torch.manual_seed(3)
    with torch.no_grad():  # at the start of training most gradients are zero
        for parameter in model.parameters():
            parameter.add_(0.02)
    weights = dict(model.named_parameters())
    before = {name: p.full_tensor().clone() for name, p in weights.items()}
    trainer.train()
    after = {name: p.full_tensor().detach() for name, p in weights.items()}
    kept = {k.split(".", 1)[1].rpartition(".")[0] for k in trainer.optimizers.state_dict()
            if k.startswith("state.")}  # fmt: skip
    averaged = set(trainer.hooks[0].averages["0.9"].values)
    trainer.close()
    return before, after, kept, averaged


@pytest.mark.parametrize("mesh", MESHES)
def test_only_what_is_named_is_trained(tmp_path, mesh):
    ranks, more = MESHES[mesh]
    local = 8 // (ranks if "shard" in str(more) else 1)
    argv = arguments(
        tmp_path, local, "--training.train_only", ONLY, "--training.steps", "2",
        "--ema.decay", "0.9", "--validation.no-enable", *more,
    )  # fmt: skip
    before, after, kept, averaged = run_ranks(ranks, run, argv)[0]
    for name in before:
        assert torch.equal(before[name], after[name]) != (ONLY in name), name
    assert averaged == {name for name in before if ONLY in name}
    assert kept == averaged
