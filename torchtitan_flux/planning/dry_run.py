"""A training step of the real model through the real `parallelize_flux`, on fake tensors.

Nothing is allocated and nothing is sent: one process stands for rank 0 of any number of ranks.
Blocks of a kind do the same, so three of each are run, and the middle one stands for the others.
"""

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from torchtitan.config import TORCH_DTYPE_MAP, Parallelism

from torchtitan_flux.config.job_config import FluxJobConfig, Training
from torchtitan_flux.config.problems import ConfigError
from torchtitan_flux.flow_matching import squared_errors
from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.model.inputs import FluxInputs, TextConditioning, flux_inputs
from torchtitan_flux.parallel import context
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.parallelize import parallelize_flux, sync_gradients
from torchtitan_flux.planning.tracker import MemoryTracker, Timeline
from torchtitan_flux.shards import local

KEYS = {
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
}
"""Degree -> key of [parallelism]."""

KINDS = ("double_blocks", "single_blocks")

PROBE_BLOCKS = 3
"""Blocks of a kind that are run: the first, one for all between, the last."""


@dataclass(frozen=True)
class Mesh:
    """Degrees of [parallelism]; the ranks of a context group also share the weights' shards."""

    replicate: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.cp * self.tp * self.pp

    @property
    def data(self) -> int:
        """Ranks that read different samples."""
        return self.replicate * self.shard

    @property
    def fsdp(self) -> int:
        """Ranks that a weight is sharded over."""
        return self.shard * self.cp

    def microbatches(self, t: Training) -> int:
        """Whose gradients are summed before they are communicated."""
        return max(1, t.global_batch_size // (t.local_batch_size * self.data))

    def __str__(self) -> str:
        return ",".join(f"{n}={d}" for n, d in asdict(self).items() if d > 1) or "shard=1"


def parse_mesh(text: str) -> Mesh:
    """`replicate=8,shard=8`; what is not named is 1.

    Raises:
        ConfigError: a degree that does not exist, or is no number.
    """
    try:
        mesh = Mesh(**{name: int(value) for name, value in (d.split("=") for d in text.split(","))})
    except (ValueError, TypeError):
        mesh = Mesh(0)
    if min(asdict(mesh).values()) < 1:
        raise ConfigError(
            [f"--mesh {text}: write replicate=8,shard=8,cp=1,tp=1,pp=1, or some of these"]
        )
    return mesh


def mesh_of(p: Parallelism, ranks: int) -> Mesh:
    """Degrees of section [parallelism]; -1 for the shard degree takes what is left."""
    mesh = Mesh(**{name: getattr(p, key) for name, key in KEYS.items()})
    return mesh if mesh.shard > 0 else replace(mesh, shard=max(1, ranks // -mesh.ranks))


def with_mesh(config: FluxJobConfig, mesh: Mesh) -> FluxJobConfig:
    """A copy of the configuration with these degrees."""
    config = copy.deepcopy(config)
    for name, key in KEYS.items():
        setattr(config.parallelism, key, getattr(mesh, name))
    return config


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
    mesh: Mesh,
    microbatches: int = 1,
    all_blocks: bool = False,
) -> DryRun:
    """One step on a mesh, of a model that is not cut into pipeline stages.

    Args:
        mesh: degrees in place of the configuration's; for a pipeline one microbatch is run.
        microbatches: whose gradients are summed; two show what more of them do.
        all_blocks: run all of them, instead of three of each kind where that tells the same.
    """
    config = with_mesh(config, replace(mesh, pp=1))
    p, ac = config.parallelism, config.activation_checkpoint
    batch = config.training.local_batch_size
    if mesh.pp > 1:
        batch, microbatches = p.pipeline_parallel_microbatch_size, 1
        # weights of a stage stay gathered; planning/estimate.py adds them, for it knows the stages
        p.fsdp_reshard_after_forward = "always"
    config.compile.enable = False
    config.debug.seed = 0
    config.training.enable_cpu_offload = False
    ac.offload_inputs = False
    by_number = ac.mode == "selective" and ac.selective_ac_option != "op"
    probe = args if all_blocks or by_number else probe_args(args)
    world = mesh.ranks // mesh.pp
    with fake_ranks(world), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP, of views
        dims = FluxParallelDims.of(p, world)
        dims.build_mesh()
        with torch.device("meta"):
            model = FluxModel(probe)
        parallelize_flux(model, dims, config)
        tracker = MemoryTracker(_dimensions(dims))
        with FakeTensorMode(allow_non_fake_inputs=True), tracker:
            model.to_empty(device="cpu")
            parameters = _note_parameters(model, tracker)
            dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
            inputs = model_inputs(config, args, batch, dtype)
            mark_blocks(model, tracker)
            for left in reversed(range(min(2, microbatches))):
                sync_gradients(model, left == 0)
                tracker.mark("forward")
                velocity = model(*inputs)
                target = torch.empty_like(velocity, dtype=torch.float32)
                errors = squared_errors(velocity, target)
                tracker.mark("backward")
                errors.sum().backward()
                del velocity, target, errors
            tracker.mark("end")
        context._valid_index.cache_clear()  # it keeps tensors, here fake ones
    counts = blocks_of(args)
    for kind, number in blocks_of(probe).items():
        parameters[kind] = parameters[kind] // max(1, number) * counts[kind]
    return DryRun(parameters, Timeline(tracker.segments[1:]).repeated(counts))


def tokens_of(config: FluxJobConfig, args: FluxModelArgs) -> tuple[int, int]:
    """(image, text) tokens of a sample."""
    return args.geometry.grid(config.training.image_size).tokens, config.encoder.max_t5_encoding_len


def blocks_of(args: FluxModelArgs) -> dict[str, int]:
    """Blocks of each kind."""
    return dict(zip(KINDS, (args.depth, args.depth_single_blocks), strict=True))


def probe_args(args: FluxModelArgs) -> FluxModelArgs:
    """The model with three blocks of a kind at most."""
    n = PROBE_BLOCKS
    return replace(
        args, depth=min(args.depth, n), depth_single_blocks=min(args.depth_single_blocks, n)
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
        shard = local(parameter)
        tracker.note(shard)
        head = name.split(".")[0]
        found[head if head in KINDS else ""] += shard.nbytes
    return found


def model_inputs(
    config: FluxJobConfig, args: FluxModelArgs, batch: int, dtype: torch.dtype
) -> FluxInputs:
    """Arguments of the model's forward; what comes from the text encoders has this dtype."""
    img, txt = tokens_of(config, args)
    text = TextConditioning(
        torch.empty(batch, txt, args.context_in_dim, dtype=dtype),
        torch.empty(batch, args.vec_in_dim, dtype=dtype),
    )
    guidance = 0.0 if args.guidance_embed else None
    tokens, size = torch.empty(batch, img, args.in_channels), config.training.image_size
    return flux_inputs(tokens, torch.empty(batch), text, args.geometry, size, guidance)


def mark_blocks(model: FluxModel, tracker: MemoryTracker) -> None:
    """Mark where blocks begin: in the forward pass at the call, in the backward pass when the
    gradient of a block's result arrives; each time before FSDP gathers and prefetches."""

    def forward_begins(label: tuple[str, int], _: nn.Module, args: tuple[Any, ...]) -> None:
        tracker.mark("forward", *label)
        if label == ("double_blocks", 0):
            _mark_once(tracker, ("backward",), args)

    def forward_ends(label: tuple[str, int], _: nn.Module, args: Any, result: Any) -> None:
        _mark_once(tracker, ("backward", *label), result)

    for kind in KINDS:
        for number, block in enumerate(getattr(model, kind).values()):
            begins, ends = (
                functools.partial(f, (kind, number)) for f in (forward_begins, forward_ends)
            )
            block.register_forward_pre_hook(begins, prepend=True)
            block.register_forward_hook(ends, prepend=True)
    model.final_layer.register_forward_pre_hook(lambda *_: tracker.mark("forward"), prepend=True)


def _mark_once(tracker: MemoryTracker, label: tuple[Any, ...], tensors: Any) -> None:
    """Mark when the first gradient of these tensors arrives."""
    marked = []

    def begins(_: Tensor) -> None:
        if not marked:
            marked.append(True)
            tracker.mark(*label)

    for tensor in tree_leaves(tensors):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(begins)
