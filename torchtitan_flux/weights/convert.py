"""Any format of FLUX weights to any other that we write, tensor by tensor.

The peak of memory is three tensors in the written element type, whatever the size of the model.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from torchtitan.tools.logging import logger
from tqdm import tqdm

from torchtitan_flux.checkpoint.manifest import Manifest
from torchtitan_flux.checkpoint.run_facts import RunFacts
from torchtitan_flux.formatting import format_bytes, listed
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.tensor_files.safetensors_writer import Specs, TensorsWriter, total_bytes
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.export_dcp import write_checkpoint
from torchtitan_flux.weights.key_maps import Layout, foreign_shapes, layout_entries
from torchtitan_flux.weights.model_card import companion_files, license_and_card
from torchtitan_flux.weights.open import COMFYUI_PREFIX, WEIGHTS_NAME, Weights, open_weights
from torchtitan_flux.weights.pipeline_folder import PipelineParts, PipelinePlan, pipeline_plan
from torchtitan_flux.weights.scheduler import SCHEDULER_FILE, SCHEDULER_KEY, stated_scheduler
from torchtitan_flux.weights.staging import check_suffix, staged

TargetFormat = Literal["dcp", "bfl", "comfyui", "diffusers", "pipeline"]
TARGET_FORMATS: tuple[TargetFormat, ...] = get_args(TargetFormat)
CHECKSUMS = "SHA256SUMS"


def convert(
    source: Weights | str | Path,
    target: str | Path,
    format: TargetFormat,
    *,
    dtype: torch.dtype | None = None,
    args: FluxModelArgs | None = None,
    max_shard_size: str = "10GB",
    overwrite: bool = False,
    verify: bool = False,
    parts: PipelineParts | None = None,
) -> None:
    """Write weights in another format; complete, or not at all.

    By one process, also where several are joined: it asks no other.

    Args:
        source: what is converted; a path is opened with `args`.
        target: a folder for "dcp", "diffusers" and "pipeline", a `.safetensors` file for "bfl" and
            "comfyui". Checksums, licence and model card go into the folder, or beside the file
            under its name.
        format: what is written.
        dtype: element type; None keeps what each parameter has.
        max_shard_size: of the files of a diffusers folder.
        overwrite: replace an earlier export of this name.
        verify: read the result back and compare every parameter, of a pipeline every file, bit for
            bit.
        parts: encoders and autoencoder of a pipeline; None takes those that the source names.

    Raises:
        UnreadableWeights, KeyMismatch, FileNotFoundError: see `open_weights`.
        TargetRefused: the target exists, is of another kind, or does not fit on the disk.
        ValueError: the format cannot hold this model, or the element type one of its values.
        OSError: reading or writing failed.
    """
    target = Path(target)
    check_suffix(target, format)
    if not isinstance(source, Weights):
        source = open_weights(source, args, alone=True)
    plan = pipeline_plan(source, parts) if format == "pipeline" else None
    library = "diffusers" if format in ("diffusers", "pipeline") else "torchtitan-flux"
    job = _Job(source, dtype, max_shard_size, plan, companion_files(source, target.stem, library))
    reads = [source.path, *(plan.reads if plan else ())]
    outdated = []
    if format in ("bfl", "comfyui"):  # companions of an earlier file of this name
        names = [*license_and_card(target), *job.companions, CHECKSUMS]
        outdated = [target.with_name(f"{target.stem}.{name}") for name in names]
    needed = job.bytes + (plan.bytes if plan else 0)
    with staged(target, needed, overwrite, reads, outdated) as stage:
        logger.info(f"Writing {target}: {format_bytes(job.bytes)} of weights")
        with job.progress():
            _WRITERS[format](job, stage / target.name)
        if verify:
            _verify(job, stage / target.name)
    logger.info(f"Wrote {target}" + (", verified: every tensor is bit-equal" if verify else ""))


@dataclass
class _Job:
    """What is written, and in which element type.

    Attributes:
        companions: licences, card and scheduler, by their names in a folder.
    """

    weights: Weights
    dtype: torch.dtype | None
    max_shard_size: str
    pipeline: PipelinePlan | None
    companions: dict[str, bytes]
    _bar: tqdm = field(default_factory=lambda: tqdm(disable=True))

    @property
    def specs(self) -> Specs:
        """Of every parameter, by our names."""
        weights = self.weights
        return {
            name: (self.dtype or weights.dtypes[name], shape)
            for name, shape in weights.shapes.items()
        }

    @property
    def bytes(self) -> int:
        """Of all weights, in any layout."""
        return total_bytes(self.specs)

    @contextmanager
    def progress(self) -> Iterator[None]:
        """A bar of all that `read` returns meanwhile."""
        with tqdm(total=self.bytes, unit="B", unit_scale=True, disable=None) as self._bar:
            yield

    def read(self, name: str) -> Tensor:
        """A parameter as it is written; UnreadableWeights where its type cannot hold a value."""
        value = self.weights.read(name, dtype=self.dtype or self.weights.dtypes[name])
        self._bar.update(value.nbytes)
        return value

    def foreign_specs(self, layout: Layout, prefix: str = "") -> Specs:
        """By the names of a layout, in its order."""
        args, ours = self.weights.args, self.specs
        entries = layout_entries(layout, args)
        shapes = foreign_shapes(args, entries)
        return {
            f"{prefix}{name}": (ours[entry.ours][0], shapes[name])
            for entry in entries
            for name in entry.theirs
        }

    def tensors(self, layout: Layout) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of a layout in its order; only one of ours is held, with its pieces."""
        for entry in layout_entries(layout, self.weights.args):
            yield from zip(entry.theirs, entry.split(self.read(entry.ours)), strict=True)


# ---- the formats ---------------------------------------------------------------------------


def _write_dcp(job: _Job, folder: Path) -> None:
    args, step = job.weights.args, 0
    facts = RunFacts(
        seed=0,
        global_batch_size=1,
        context_in_dim=args.context_in_dim,
        vec_in_dim=args.vec_in_dim,
        in_channels=args.in_channels,
        depth=args.depth,
        depth_single_blocks=args.depth_single_blocks,
    )
    if job.weights.format == "dcp":
        manifest = Manifest.read(job.weights.path)
        step, facts = manifest.step, manifest.facts
    stated = {architecture.ARGS_FILE: json.dumps(asdict(args), indent=1).encode()}
    companions = {**job.companions, **_scheduler_file(job), **stated}
    write_checkpoint(folder, job.specs, job.read, step, facts, companions)


def _write_file(job: _Job, path: Path, prefix: str = "") -> None:
    scheduler = stated_scheduler(job.weights.path)
    metadata = architecture.to_metadata(job.weights.args)
    metadata |= {} if scheduler is None else {SCHEDULER_KEY: scheduler.text}
    specs = job.foreign_specs("bfl", prefix)
    with TensorsWriter(path.parent, {path.name: specs}, metadata) as writer:
        for name, tensor in job.tensors("bfl"):
            writer.write(f"{prefix}{name}", tensor)
    for name, content in job.companions.items():
        (path.parent / f"{path.stem}.{name}").write_bytes(content)
    _write_checksums(path.parent, f"{path.stem}.{CHECKSUMS}")


def _write_diffusers(job: _Job, folder: Path) -> None:
    _write_transformer(job, folder)
    for name, content in (job.companions | _scheduler_file(job)).items():
        (folder / name).write_bytes(content)
    _write_checksums(folder, CHECKSUMS)


def _write_pipeline(job: _Job, folder: Path) -> None:
    assert job.pipeline is not None
    _write_transformer(job, folder / "transformer")
    job.pipeline.write(folder)
    for name, content in job.companions.items():
        (folder / name).write_bytes(content)
    _write_checksums(folder, CHECKSUMS)


_WRITERS: dict[TargetFormat, Callable[[_Job, Path], None]] = {
    "dcp": _write_dcp,
    "bfl": _write_file,
    "comfyui": partial(_write_file, prefix=COMFYUI_PREFIX),
    "diffusers": _write_diffusers,
    "pipeline": _write_pipeline,
}


def _write_transformer(job: _Job, folder: Path) -> None:
    """What FluxTransformer2DModel opens."""
    config = architecture.to_diffusers_config(job.weights.args)
    specs = job.foreign_specs("diffusers")
    empty = {name: torch.empty(s, dtype=t, device="meta") for name, (t, s) in specs.items()}
    try:
        shards = split_torch_state_dict_into_shards(
            empty,
            filename_pattern=f"{WEIGHTS_NAME}{{suffix}}.safetensors",
            max_shard_size=job.max_shard_size,
        )
    except ValueError as error:
        raise ValueError(f"--max_shard_size: {error}") from None
    files = {
        file: {name: specs[name] for name in names}
        for file, names in shards.filename_to_tensors.items()
    }
    folder.mkdir(parents=True)
    with TensorsWriter(folder, files, architecture.to_metadata(job.weights.args)) as writer:
        for name, tensor in job.tensors("diffusers"):
            writer.write(name, tensor)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        name = f"{WEIGHTS_NAME}.safetensors.index.json"
        (folder / name).write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _scheduler_file(job: _Job) -> dict[str, bytes]:
    scheduler = stated_scheduler(job.weights.path)
    return {} if scheduler is None else {SCHEDULER_FILE: scheduler.text.encode()}


def _write_checksums(folder: Path, name: str) -> None:
    """A file that `sha256sum -c` reads, of everything in `folder`."""
    files = sorted(one for one in folder.rglob("*") if one.is_file())
    lines = [f"{_sha256(one)}  {one.relative_to(folder)}\n" for one in files]
    (folder / name).write_text("".join(lines))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**23):
            digest.update(block)
    return digest.hexdigest()


# ---- verification --------------------------------------------------------------------------


def _verify(job: _Job, written: Path) -> None:
    """Read an export back; UnreadableWeights names the parameters that are not bit-equal."""
    if job.pipeline is not None:
        job.pipeline.verify(written)
    found = open_weights(written, job.weights.args, alone=True)
    with job.progress():
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
