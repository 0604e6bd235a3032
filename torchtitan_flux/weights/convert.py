"""Any format of FLUX weights to any other that we write, tensor by tensor.

The peak of memory is three tensors in the written element type, whatever the size of the model.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torchtitan.tools.logging import logger
from tqdm import tqdm

from torchtitan_flux.checkpoint.manifest import Manifest, RunFacts
from torchtitan_flux.checkpoint.storage import ManifestWriter, causes_of
from torchtitan_flux.formatting import format_bytes, listed
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.tensor_files.safetensors_file import (
    Specs,
    UnreadableWeights,
    read_json,
    total_bytes,
    write_json,
    write_tensors,
)
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.key_maps import Layout, foreign_shapes, layout_entries
from torchtitan_flux.weights.locations import COMFYUI_PREFIX, PIPELINE_INDEX, WEIGHTS_NAME
from torchtitan_flux.weights.model_card import companion_files
from torchtitan_flux.weights.open import Weights, open_weights
from torchtitan_flux.weights.scheduler import SCHEDULER_FILE, StatedScheduler, stated_scheduler
from torchtitan_flux.weights.staging import staged

TargetFormat = Literal["dcp", "bfl", "comfyui", "diffusers", "pipeline"]
TARGET_FORMATS: tuple[TargetFormat, ...] = get_args(TargetFormat)


def convert(
    source: Weights | str | Path,
    target: str | Path,
    format: TargetFormat,
    *,
    dtype: torch.dtype | None = None,
    args: FluxModelArgs | None = None,
    max_shard_size: str = "10GB",
    verify: bool = False,
    base: Path | None = None,
) -> None:
    """Write weights in another format; complete, or not at all.

    By one process, also where several are joined: it asks no other.

    Args:
        source: what is converted; a path is opened with `args`.
        target: a folder for "dcp", "diffusers" and "pipeline", into which licence, model card and
            scheduler go as well; a `.safetensors` file for "bfl" and "comfyui".
        dtype: None keeps what each parameter has.
        max_shard_size: of the files of a diffusers folder.
        verify: read the transformer back and compare all of it, bit for bit.
        base: for "pipeline", the folder of one, from which all but the transformer is copied; None
            where the source is one.

    Raises:
        UnreadableWeights, KeyMismatch, FileNotFoundError: see `open_weights`.
        TargetRefused: the target exists, is of another kind, or does not fit on the disk.
        ValueError: the format cannot hold this model, or the element type one of its values.
    """
    target = Path(target)
    if not isinstance(source, Weights):
        source = open_weights(source, args, alone=True)
    job = _Job(source, dtype, max_shard_size)
    if format == "pipeline":
        job.base = base or source.path
        _check_fits(job.base, source.args)
    if format not in ("bfl", "comfyui"):
        job.companions = companion_files(source, target.stem)
        job.scheduler = stated_scheduler(source.path) or (job.base and stated_scheduler(job.base))
    logger.info(f"Writing {target}: {format_bytes(job.bytes)} of weights")
    bar = partial(tqdm, unit="B", unit_scale=True, disable=None)
    with (
        staged(target, format, job.bytes) as made,
        bar(total=job.bytes * (1 + verify)) as job.bar,
    ):
        _WRITERS[format](job, made)
        if verify:
            _verify(job, made)
    logger.info(f"Wrote {target}" + (", verified: every tensor is bit-equal" if verify else ""))


def _check_fits(pipeline: Path, args: FluxModelArgs) -> None:
    """Raise UnreadableWeights unless a pipeline's encoders and autoencoder fit a transformer."""
    if not (pipeline / PIPELINE_INDEX).is_file():
        raise UnreadableWeights(
            f"{pipeline} is no pipeline: name one by --base, whose encoders and autoencoder go "
            "along; or convert to diffusers"
        )
    for part, key, needed in (
        ("text_encoder_2", "d_model", args.context_in_dim),
        ("text_encoder", "hidden_size", args.vec_in_dim),
        ("vae", "latent_channels", args.geometry.channels),
    ):
        file = pipeline / part / "config.json"
        if (found := read_json(file).get(key)) != needed:
            raise UnreadableWeights(
                f"{file}: {key} is {found}, the transformer needs {needed}; name another pipeline "
                "by --base"
            )


@dataclass
class _Job:
    """What is written, and in which element type.

    Attributes:
        base: a pipeline whose other parts go along.
        companions: licences and card, by their names in a folder.
    """

    weights: Weights
    dtype: torch.dtype | None
    max_shard_size: str
    base: Path | None = None
    companions: dict[str, bytes] = field(default_factory=dict)
    scheduler: StatedScheduler | None = None
    bar: tqdm | None = None

    @cached_property
    def specs(self) -> Specs:
        """Of every parameter, by our names."""
        dtypes, shapes = self.weights.dtypes, self.weights.shapes
        return {name: (self.dtype or dtypes[name], shape) for name, shape in shapes.items()}

    @property
    def bytes(self) -> int:
        """Of all weights, in any layout."""
        return total_bytes(self.specs)

    def read(self, name: str) -> Tensor:
        """A parameter as it is written; UnreadableWeights where its type cannot hold a value."""
        value = self.weights.read(name, dtype=self.specs[name][0])
        if self.bar is not None:
            self.bar.update(value.nbytes)
        return value

    def specs_in(self, layout: Layout) -> Specs:
        """By the names of a layout, in its order."""
        entries = layout_entries(layout, self.weights.args)
        shapes = foreign_shapes(self.weights.args, entries)
        return {n: (self.specs[e.ours][0], shapes[n]) for e in entries for n in e.theirs}

    def tensors_in(self, layout: Layout) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of a layout in its order; only one of ours is held, with its pieces."""
        for entry in layout_entries(layout, self.weights.args):
            yield from zip(entry.theirs, entry.split(self.read(entry.ours)), strict=True)


# ---- the formats ---------------------------------------------------------------------------


def _write_dcp(job: _Job, folder: Path) -> None:
    args = job.weights.args
    shared = ("context_in_dim", "vec_in_dim", "in_channels", "depth", "depth_single_blocks")
    facts = RunFacts(0, 1, **{name: getattr(args, name) for name in shared})
    manifest = Manifest(0, "model", facts)
    if job.weights.format == "dcp":
        manifest = replace(Manifest.read(job.weights.path), kind="model", settings={})
    companions = {**job.companions, architecture.ARGS_FILE: _json(asdict(args))}
    if job.scheduler is not None:
        companions[SCHEDULER_FILE] = _json(job.scheduler.config)
    writer = ManifestWriter(folder, manifest, companions=companions, file_per_tensor=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            planner = _StreamingPlanner(job.read)
            dcp.save(_empty(job.specs), storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:  # no Exception; what went wrong in here is inside
        causes = [cause for cause, _ in error.failures.values()]
        raise (causes[0] if len(causes) == 1 else OSError(causes_of(error))) from None


class _StreamingPlanner(DefaultSavePlanner):
    """Asks for a value when it is written."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._read(write_item.index.fqn)


def _empty(specs: Specs) -> dict[str, Tensor]:
    return {name: torch.empty(s, dtype=t, device="meta") for name, (t, s) in specs.items()}


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode()


def _write_file(job: _Job, path: Path, prefix: str = "") -> None:
    specs = {f"{prefix}{name}": spec for name, spec in job.specs_in("bfl").items()}
    tensors = ((f"{prefix}{name}", tensor) for name, tensor in job.tensors_in("bfl"))
    metadata = architecture.to_metadata(job.weights.args)
    write_tensors(path.parent, {path.name: specs}, metadata, tensors)


def _write_folder(job: _Job, folder: Path) -> None:
    _write_transformer(job, folder)
    if job.scheduler is not None:
        write_json(folder / SCHEDULER_FILE, job.scheduler.config)
    _write_companions(job, folder)


def _write_pipeline(job: _Job, folder: Path) -> None:
    """What FluxPipeline opens: encoders, tokenizers and autoencoder are copied as they are."""
    assert job.base is not None
    index = read_json(job.base / PIPELINE_INDEX)
    for part in index:
        if (job.base / part).is_dir() and part != "transformer":
            shutil.copytree(job.base / part, folder / part)
    _write_transformer(job, folder / "transformer")
    if job.scheduler is not None:
        index["scheduler"] = ["diffusers", job.scheduler.config["_class_name"]]
        (folder / "scheduler").mkdir(exist_ok=True)
        write_json(folder / "scheduler" / SCHEDULER_FILE, job.scheduler.config)
    write_json(folder / PIPELINE_INDEX, index)
    _write_companions(job, folder)


def _write_companions(job: _Job, folder: Path) -> None:
    for name, content in job.companions.items():
        (folder / name).write_bytes(content)


def _write_transformer(job: _Job, folder: Path) -> None:
    """What FluxTransformer2DModel opens."""
    config = architecture.to_diffusers_config(job.weights.args)
    specs = job.specs_in("diffusers")
    pattern = f"{WEIGHTS_NAME}{{suffix}}.safetensors"
    try:
        shards = split_torch_state_dict_into_shards(
            _empty(specs), filename_pattern=pattern, max_shard_size=job.max_shard_size
        )
    except ValueError as error:
        raise ValueError(f"--max_shard_size: {error}") from None
    files = {f: {n: specs[n] for n in names} for f, names in shards.filename_to_tensors.items()}
    folder.mkdir(parents=True)
    metadata = architecture.to_metadata(job.weights.args)
    write_tensors(folder, files, metadata, job.tensors_in("diffusers"))
    write_json(folder / "config.json", config)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / f"{WEIGHTS_NAME}.safetensors.index.json", index)


_WRITERS: dict[TargetFormat, Callable[[_Job, Path], None]] = {
    "dcp": _write_dcp,
    "bfl": _write_file,
    "comfyui": partial(_write_file, prefix=COMFYUI_PREFIX),
    "diffusers": _write_folder,
    "pipeline": _write_pipeline,
}


def _verify(job: _Job, written: Path) -> None:
    """Read an export back; UnreadableWeights names the parameters that are not bit-equal."""
    found = open_weights(written, job.weights.args, alone=True)
    wrong = [name for name in job.specs if not same_bits(found.read(name), job.read(name))]
    if wrong:
        raise UnreadableWeights(
            f"what was written differs from {job.weights.path} in {len(wrong)} parameters: "
            f"{listed(wrong)}; the disk or the memory is at fault, nothing was kept"
        )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN and element type included."""
    a, b = a.contiguous(), b.contiguous()
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)
    )
