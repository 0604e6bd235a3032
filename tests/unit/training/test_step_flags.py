"""A step that is skipped on the device changes nothing; a sum that is read late loses nothing."""

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.config import Optimizer

from torchtitan_flux.optimizers import FluxOptimizers
from torchtitan_flux.training.step_flags import FlagExchange, Step, step_unless

SETTINGS = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1}


def stepped(skips: list[float | None], sharded: bool, kind: str, implementation: str) -> dict:
    """Weights and optimizer states after steps with seeded gradients, NaN where it is skipped.

    A `skip` of None is a plain step of the optimizer.
    """
    torch.manual_seed(3)
    model = nn.Linear(5, 3)
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizers = FluxOptimizers([model], Optimizer(name=kind, implementation=implementation))
    for number, skip in enumerate(skips):
        for parameter in model.parameters():
            seeded = torch.Generator().manual_seed(number)
            grad = torch.randn(parameter.shape, generator=seeded) * (torch.nan if skip else 1)
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
            parameter.grad = grad
        if skip is None:
            optimizers.step()
        else:
            step_unless(torch.tensor(skip), optimizers, seed=0)
    (optimizer,) = optimizers
    states = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    tensors = {**dict(model.named_parameters()), **states}
    return {
        name: (value.to_local() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in tensors.items()
    }


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_a_skipped_step_changes_nothing(kind, implementation):
    """Weights, moments, step counts: bit by bit those of the steps that were taken."""
    expected = stepped([None, None], False, kind, implementation)
    result = stepped([0.0, 0.0], False, kind, implementation)
    skipped = stepped([0.0, 0.0, 1.0], False, kind, implementation)
    assert expected["weight.step"] == 2
    assert expected["weight.exp_avg"].abs().min() > 0
    for name, value in expected.items():
        assert torch.equal(result[name], value), name
        assert torch.equal(skipped[name], value), name


def sharded_steps(kind: str, implementation: str) -> list[dict]:
    return [
        stepped(skips, True, kind, implementation)
        for skips in ([None, None], [0.0, 0.0], [0.0, 0.0, 1.0])
    ]


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_a_skipped_step_changes_nothing_of_shards(implementation):
    whole = stepped([None, None], False, "AdamW", implementation)
    ranks = run_ranks(2, sharded_steps, "AdamW", implementation)
    for expected, *others in ranks:
        for other in others:
            for name, value in expected.items():
                assert torch.equal(other[name], value), name
    weight = torch.cat([of_rank[0]["weight"] for of_rank in ranks])
    torch.testing.assert_close(weight, whole["weight"])


def test_a_first_step_that_is_skipped_leaves_the_weights():
    untouched = stepped([], False, "AdamW", "fused")
    skipped = stepped([1.0], False, "AdamW", "fused")
    assert torch.equal(skipped["weight"], untouched["weight"])
    assert skipped["weight.step"] == 0
    assert not skipped["weight.exp_avg"].any()


def step(number: int, norm: float = 1.0) -> Step:
    return Step(number, torch.tensor([number]), torch.tensor([0.5]), torch.tensor(norm))


def said_and_heard(late: bool) -> list:
    """Of five steps: rank 1's loss in step 2, rank 0's norm in 3, a stop in 4, a picture in 5."""
    flags = FlagExchange(torch.device("cpu"), late)
    rank, heard = torch.distributed.get_rank(), []
    for number in range(1, 6):
        loss = torch.tensor(torch.inf if (number, rank) == (2, 1) else 0.5)
        norm = torch.nan if (number, rank) == (3, 0) else 1.0
        skip = flags.send(
            step(number, norm), loss, stop=(number, rank) == (4, 1), unreadable=number == 5
        )
        now = flags.receive(everything=number == 5)
        heard.append((float(skip), [(a.step.number, a.nonfinite, a.stop) for a in now]))
        unreadable = [a.step.number for a in now if a.unreadable]
    return [*heard, unreadable]


def test_every_rank_hears_the_same_of_each_step_once():
    quiet = [(1, False, False), (5, False, False)]
    of_step = {
        1: quiet[0], 2: (2, True, False), 3: (3, True, False), 4: (4, False, True), 5: quiet[1],
    }  # fmt: skip
    skips = [0.0, 1.0, 1.0, 0.0, 0.0]
    at_once = [(skip, [of_step[n]]) for n, skip in enumerate(skips, 1)]
    later = [[], [of_step[1]], [of_step[2]], [of_step[3]], [of_step[4], of_step[5]]]
    late = list(zip(skips, later, strict=True))
    assert run_ranks(2, said_and_heard, False) == [[*at_once, [5]]] * 2
    assert run_ranks(2, said_and_heard, True) == [[*late, [5]]] * 2
