"""A training step of the real model through the real `parallelize_flux`, on fake tensors.

Nothing is allocated and nothing is sent: one process stands for rank 0 of any number of ranks.
Blocks of a kind are alike, so three of each tell what any number of them needs: what the one in
the middle does is repeated.
"""

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from torchtitan.config import TORCH_DTYPE_MAP

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.flow_matching import squared_errors
from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.parallel import context
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.parallelize import parallelize_flux, sync_gradients
from torchtitan_flux.planning.timeline import KINDS, Timeline, blocks_of
from torchtitan_flux.planning.tracker import MemoryTracker

SHOWN = 3
"""Blocks of a kind that show how many behave: the first, one of many, the last."""


@dataclass(frozen=True)
class DryRun:
    """What a step does on rank 0; the optimizer's states are not part of it.

    Attributes:
        parameters: bytes of this rank's shards, by kind of block; "" for all else.
        step: forward and backward pass.
    """

    parameters: dict[str, int]
    step: Timeline


def dry_run(
    config: FluxJobConfig,
    args: FluxModelArgs,
    batch: int,
    img_tokens: int,
    text_tokens: int,
    whole: bool = False,
    microbatches: int = 1,
) -> DryRun:
    """One step on the configured mesh, of a model that is not cut into pipeline stages.

    Args:
        config: job configuration; its degrees make the ranks.
        args: of the model.
        batch: samples of one rank and microbatch.
        img_tokens, text_tokens: of a sample.
        whole: run all blocks, instead of three of each kind.
        microbatches: gradients are summed over as many, as the trainer does.
    """
    config = copy.deepcopy(config)
    p = config.parallelism
    if p.pipeline_parallel_degree > 1:
        # weights of a stage stay gathered; planning/estimate.py adds them, for it knows the stages
        p.fsdp_reshard_after_forward = "always"
    p.pipeline_parallel_degree = 1
    config.compile.enable = False
    config.debug.seed = 0
    config.training.enable_cpu_offload = False
    config.activation_checkpoint.offload_inputs = False
    shown = args if whole else shown_of(args)
    world = (
        p.data_parallel_replicate_degree
        * p.data_parallel_shard_degree
        * p.context_parallel_degree
        * p.tensor_parallel_degree
    )
    with fake_ranks(world), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP, of views
        dims = FluxParallelDims.of(p, world)
        dims.build_mesh()
        with torch.device("meta"):
            model = FluxModel(shown)
        parallelize_flux(model, dims, config)
        tracker = MemoryTracker(_dimensions(dims))
        with FakeTensorMode(allow_non_fake_inputs=True), tracker:
            model.to_empty(device="cpu")
            parameters = _note_parameters(model, tracker)
            dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
            inputs = model_inputs(args, batch, img_tokens, text_tokens, dtype)
            mark_blocks(model, tracker)
            for number in range(microbatches):
                last = number == microbatches - 1
                sync_gradients(model, last)
                tracker.mark("forward")
                velocity = model(**inputs)
                target = torch.empty_like(velocity, dtype=torch.float32)
                errors = squared_errors(velocity, target)
                tracker.mark("backward")
                errors.sum().backward()
                del velocity, target, errors
            tracker.mark("end")
        context._valid_index.cache_clear()  # it keeps tensors, here fake ones
    counts = blocks_of(args)
    for kind, number in blocks_of(shown).items():
        parameters[kind] = parameters[kind] // max(1, number) * counts[kind]
    return DryRun(parameters, Timeline(tracker.segments[1:]).repeated(counts))


def shown_of(args: FluxModelArgs) -> FluxModelArgs:
    """The model with few blocks of a kind."""
    return replace(
        args,
        depth=min(args.depth, SHOWN),
        depth_single_blocks=min(args.depth_single_blocks, SHOWN),
    )


@contextmanager
def fake_ranks(world: int) -> Iterator[None]:
    """A process group of `world` ranks that send nothing; this process is rank 0."""
    assert not dist.is_initialized(), "a dry run has ranks of its own"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # what DTensor has looked up names groups that are gone
        _clear_sharding_prop_cache()
        _gen_transform_infos.cache_clear()


def _dimensions(dims: FluxParallelDims) -> dict[str, str]:
    """Names of process groups -> dimensions of the mesh."""
    names = {"cp": "cp", "dp_replicate": "replicate", "fsdp": "fsdp", "tp": "tp"}
    found: dict[str, str] = {}
    for name, dimension in names.items():
        mesh = dims.get_optional_mesh(name)
        if mesh is not None:
            group = mesh.get_group().group_name
            # without a shard degree the context group is the one that weights are sharded over
            found[group] = f"{found[group]}+{dimension}" if group in found else dimension
    return found


def _note_parameters(model: nn.Module, tracker: MemoryTracker) -> dict[str, int]:
    """Bytes of this rank's parameters, by kind of block."""
    found: dict[str, int] = {kind: 0 for kind in ("", *KINDS)}
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        tracker.note(local)
        head = name.split(".")[0]
        found[head if head in KINDS else ""] += local.nbytes
    return found


def model_inputs(
    args: FluxModelArgs, batch: int, img_tokens: int, text_tokens: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Arguments of the model's forward; what comes from the text encoders is in their dtype."""
    axes = len(args.axes_dim)
    inputs = {
        "img": torch.empty(batch, img_tokens, args.in_channels),
        "img_ids": torch.empty(batch, img_tokens, axes),
        "txt": torch.empty(batch, text_tokens, args.context_in_dim, dtype=dtype),
        "txt_ids": torch.empty(batch, text_tokens, axes),
        "timesteps": torch.empty(batch),
        "y": torch.empty(batch, args.vec_in_dim, dtype=dtype),
    }
    if args.guidance_embed:
        inputs["guidance"] = torch.empty(batch)
    return inputs


def mark_blocks(model: FluxModel, tracker: MemoryTracker) -> None:
    """Mark where blocks begin: in the forward pass at the call, in the backward pass when the
    gradient of a block's result is there; each time before FSDP gathers and prefetches."""
    for kind in KINDS:
        for number, block in enumerate(getattr(model, kind).values()):
            begins = functools.partial(_forward_begins, tracker, kind, number)
            block.register_forward_pre_hook(begins, prepend=True)
            watch = functools.partial(_watch_backward, tracker, kind, number)
            block.register_forward_hook(watch, prepend=True)
    model.final_layer.register_forward_pre_hook(lambda *_: tracker.mark("forward"), prepend=True)


def _forward_begins(
    tracker: MemoryTracker, kind: str, number: int, _: nn.Module, args: tuple[Any, ...]
) -> None:
    tracker.mark("forward", kind, number)
    if (kind, number) == ("double_blocks", 0):
        _mark_once(tracker, ("backward",), args)


def _watch_backward(
    tracker: MemoryTracker, kind: str, number: int, _: nn.Module, args: Any, result: Any
) -> None:
    _mark_once(tracker, ("backward", kind, number), result)


def _mark_once(tracker: MemoryTracker, label: tuple[Any, ...], tensors: Any) -> None:
    """Mark when the first gradient of these tensors is there."""
    marked = []

    def begins(_: Tensor) -> None:
        if not marked:
            marked.append(True)
            tracker.mark(*label)

    for tensor in tree_leaves(tensors):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(begins)
