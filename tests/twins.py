"""One model, one batch, five steps: on one rank, and on many through `parallelize_flux`."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
import torch.distributed as dist
from helpers import model_inputs, randomize, relative_l2
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_flux.model import FLAVORS, FluxModel, FluxModelArgs
from torchtitan_flux.model.initial_values import canonical_name
from torchtitan_flux.model.inputs import FluxInputs
from torchtitan_flux.parallel.clip import clip_gradients
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.parallelize import parallelize_flux
from torchtitan_flux.parallel.pipeline import pipeline_flux
from torchtitan_flux.shards import box, local
from torchtitan_flux.startup.load_config import load_config
from torchtitan_flux.training import losses

STEPS = 5
CLIP = 0.5
TWIN = "flux-twin"
"""Flavor of a case with other blocks than flux-tiny's."""


@dataclass(frozen=True)
class Case:
    """A mesh and what runs on it."""

    replicate: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    schedule: str = "1F1B"
    pipelined: int = 1  # samples of a pipeline's microbatch
    blocks: tuple[int, int] = (2, 2)
    microbatches: int = 1
    ac: tuple[str, ...] = ("none",)
    guidance: bool = False
    batch: int = 4
    rows: int = 3
    cols: int = 8
    text: int = 8
    dtype: str = "float32"
    seed: int = 5
    steps: int = STEPS
    more: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.cp * self.tp * self.pp

    @property
    def args(self) -> FluxModelArgs:
        depths = {"depth": self.blocks[0], "depth_single_blocks": self.blocks[1]}
        return replace(FLAVORS["flux-tiny"], guidance_embed=self.guidance, **depths)

    def model(self) -> FluxModel:
        """Whole, every parameter non-zero; matrices small enough that float32 keeps six digits."""
        return randomize(FluxModel(self.args), self.seed, scale=0.5)  # type: ignore[return-value]

    def data(self) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the whole batch, and the velocity that is wanted."""
        inputs = model_inputs(self.args, self.batch, self.rows, self.cols, self.text, self.seed + 1)
        rng = torch.Generator().manual_seed(self.seed + 2)
        shape = (self.batch, self.rows * self.cols, self.args.out_channels)
        return inputs, torch.randn(shape, generator=rng)

    @property
    def alone(self) -> "Case":
        """The same on one rank, without anything that must not matter."""
        kept = ("guidance", "batch", "rows", "cols", "text", "dtype", "seed", "blocks")
        return Case(**{name: getattr(self, name) for name in kept})

    def argv(self) -> list[str]:
        mode, *option = self.ac
        local = self.batch // (self.replicate * self.shard) // self.microbatches
        keys: dict[str, Any] = {
            "job.config_file": "train_configs/debug_model.toml",
            "model.flavor": "flux-tiny" if self.blocks == (2, 2) else TWIN,
            "training.img_size": 64,
            "training.local_batch_size": local,
            "training.mixed_precision_param": self.dtype,
            "debug.seed": 1,
            "parallelism.data_parallel_replicate_degree": self.replicate,
            "parallelism.data_parallel_shard_degree": self.shard,
            "parallelism.context_parallel_degree": self.cp,
            "parallelism.tensor_parallel_degree": self.tp,
            "parallelism.pipeline_parallel_degree": self.pp,
            "parallelism.pipeline_parallel_schedule": self.schedule,
            "parallelism.pipeline_parallel_microbatch_size": self.pipelined,
            "activation_checkpoint.mode": mode,
        }
        if option:
            keys["activation_checkpoint.selective_ac_option"] = option[0]
        return [*(word for k, v in keys.items() for word in (f"--{k}", str(v))), *self.more]


def tiers(
    cases: dict[str, Case], slow: tuple[str, ...] = (), long: tuple[str, ...] = ()
) -> list[Any]:
    """Parameters of a test, each in its tier."""
    marks = {name: [pytest.mark.slow] for name in slow} | {n: [pytest.mark.long] for n in long}
    return [pytest.param(case, id=name, marks=marks.get(name, [])) for name, case in cases.items()]


@dataclass
class Twin:
    """What the steps gave, on any rank: losses, norms before clipping, whole gradients of the
    first step and whole weights after the last, by canonical name."""

    loss: list[float]
    norm: list[float]
    grads: dict[str, Tensor]
    weights: dict[str, Tensor]


def fill(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Give a sharded model these whole values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shard, slices = local(parameter), box(parameter)
            shard.copy_(values[canonical_name(name)][slices])
            assert torch.equal(whole(parameter), values[canonical_name(name)]), name


def build(case: Case) -> tuple[FluxParallelDims, Any, list[nn.Module]]:
    """As the trainer does: the mesh, the pipeline or None, this rank's parts of the model."""
    FLAVORS[TWIN] = case.args  # a process of its own
    config = load_config(case.argv())
    dims = FluxParallelDims.of(config.parallelism, dist.get_world_size())
    with torch.device("meta"):
        model = FluxModel(case.args)
    pipeline = None
    if case.pp > 1:
        pipeline, models, *_ = pipeline_flux(
            model, dims, config, torch.device("cpu"), case.args, parallelize_flux
        )
    else:
        models = [parallelize_flux(model, dims, config)]
    for part in models:
        part.to_empty(device="cpu")
        fill(part, dict(case.model().named_parameters()))
    return dims, pipeline, models


def run_twin(case: Case) -> Twin:
    """Five clipped AdamW steps on a fixed batch, all parameters non-zero; called on every rank."""
    dims, pipeline, models = build(case)
    inputs, target = case.data()
    share = case.batch // dims.data_degree
    piece = share // case.microbatches
    elements = target[..., 0].numel()

    def backward() -> Tensor:
        loss = torch.zeros(())
        for m in range(case.microbatches):
            begin = dims.data_rank * share + m * piece
            at = slice(begin, begin + piece)
            here = FluxInputs(**{name: x[at] for name, x in inputs.items()})
            last = m == case.microbatches - 1
            model = models[0] if pipeline is None else pipeline
            loss += losses.forward_backward(model, here, target[at], elements, last).sum()
        if dims.data_group is not None:
            dist.all_reduce(loss, group=dims.data_group)
        return loss

    pp_mesh = dims.get_optional_mesh("pp")
    clip = functools.partial(clip_gradients, pp_mesh=pp_mesh)
    return steps(models, backward, clip, case.steps, pp_mesh)


def bare_twin(case: Case) -> Twin:
    """The same of the bare model, in float64: what every mesh must come to within rounding."""
    model = case.model().double()
    inputs, target = case.data()

    def backward() -> Tensor:
        out = model(**{name: x.double() for name, x in inputs.items()})
        loss = (out - target).square().sum() / target[..., 0].numel()
        loss.backward()
        return loss.detach()

    return steps([model], backward, nn.utils.clip_grad_norm_, case.steps)


def steps(
    models: list[nn.Module],
    backward: Callable[[], Tensor],
    clip: Callable[[list[nn.Parameter], float], Tensor],
    count: int,
    pp_mesh: DeviceMesh | None = None,
) -> Twin:
    """`backward` fills the gradients and returns the loss of the whole batch; each rank of
    `pp_mesh` has a part of the model, and gets what the others have."""
    named = [(canonical_name(n), p) for model in models for n, p in model.named_parameters()]
    parameters = [p for _, p in named]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    twin = Twin([], [], {}, {})
    for _ in range(count):
        optimizer.zero_grad()
        twin.loss.append(float(backward()))
        if not twin.grads:
            twin.grads = {name: whole(p.grad) for name, p in named}
        twin.norm.append(float(clip(parameters, CLIP)))
        optimizer.step()
    twin.weights = {name: whole(p.detach()) for name, p in named}
    if pp_mesh is not None:
        twin.grads, twin.weights = gathered(twin.grads, pp_mesh), gathered(twin.weights, pp_mesh)
    return twin


def gathered(parts: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    """What all ranks of `mesh` have, each something else."""
    found: list[dict[str, Tensor]] = [{} for _ in range(mesh.size())]
    dist.all_gather_object(found, parts, group=mesh.get_group())
    joined = {name: x for of_rank in found for name, x in of_rank.items()}
    assert len(joined) == sum(map(len, found)), "two ranks have the same parameter"
    return joined


def whole(tensor: Any) -> Tensor:
    """A copy of all of a tensor that is sharded, on each rank."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


class Difference(NamedTuple):
    """Largest relative differences of two twins, over steps and parameters."""

    loss: float
    grad: float
    where: str
    norm: float
    weights: float


def difference(one: Twin, other: Twin) -> Difference:
    errors = {}
    assert one.grads.keys() == other.grads.keys()
    for name, grad in one.grads.items():
        assert grad.abs().max() > 1e-6, f"{name} is not tested"
        errors[name] = float((other.grads[name] - grad).abs().max() / grad.abs().max())
    grad, where = max((error, name) for name, error in errors.items())
    weights = max(relative_l2(other.weights[name], w) for name, w in one.weights.items())

    def relative(a: list[float], b: list[float]) -> float:
        return max(abs(y - x) / abs(x) for x, y in zip(a, b, strict=True))

    loss, norm = relative(one.loss, other.loss), relative(one.norm, other.norm)
    return Difference(loss, grad, where, norm, weights)


reference = functools.cache(bare_twin)
"""What every mesh must come to; of a case on one rank (`Case.alone`)."""


def assert_as_on_one_device(case: Case) -> None:
    """Every rank of the case's mesh has what the bare model has on one device."""
    for twin in run_ranks(case.ranks, run_twin, case):
        apart = difference(reference(case.alone), twin)
        assert max(apart.loss, apart.norm) <= 1e-6, apart
        assert apart.grad <= 2e-6, apart
        assert apart.weights <= 2e-5, apart


def mutant(case: Case, owner: object, name: str, value: object) -> Twin:
    setattr(owner, name, value)  # in a process of its own: nothing needs to be put back
    return run_twin(case)


def assert_mutant_is_seen(case: Case, owner: object, name: str, value: object) -> None:
    """With this attribute replaced, gradients are not those of one device."""
    twin = run_ranks(case.ranks, mutant, case, owner, name, value)[0]
    assert difference(reference(case.alone), twin).grad > 1e-3
