"""Any format of FLUX weights to any other that we write, tensor by tensor.

The peak of memory is two tensors in the written element type, whatever the size of the model.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torch import Tensor
from torchtitan.tools.logging import logger
from tqdm import tqdm

from torchtitan_flux.checkpoint.manifest import Manifest
from torchtitan_flux.checkpoint.run_facts import RunFacts
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.tensor_files.safetensors_file import SAFETENSORS, UnreadableWeights
from torchtitan_flux.tensor_files.safetensors_writer import (
    Specs,
    TensorsWriter,
    parse_size,
    total_bytes,
)
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.convert_autoencoder import check_vae, open_autoencoder
from torchtitan_flux.weights.export_dcp import write_checkpoint
from torchtitan_flux.weights.key_maps import Layout, foreign_shapes, layout_entries
from torchtitan_flux.weights.model_card import travelling_files
from torchtitan_flux.weights.open import (
    COMFYUI_PREFIX,
    WEIGHTS_NAME,
    Guidance,
    Unknown,
    Weights,
    open_weights,
)
from torchtitan_flux.weights.pipeline_folder import PipelineParts, PipelinePlan, pipeline_plan
from torchtitan_flux.weights.scheduler import (
    SCHEDULER_FILE,
    SCHEDULER_KEY,
    stated_scheduler,
)
from torchtitan_flux.weights.staging import TargetRefused, staged

TargetFormat = Literal["dcp", "bfl", "comfyui", "diffusers", "pipeline"]
TARGET_FORMATS: tuple[TargetFormat, ...] = ("dcp", "bfl", "comfyui", "diffusers", "pipeline")
CHECKSUMS = "SHA256SUMS"

_BLOCK = 8 * 2**20


def convert(
    source: Weights | str | Path,
    target: str | Path,
    format: TargetFormat,
    *,
    dtype: torch.dtype | None = None,
    args: FluxModelArgs | None = None,
    guidance: Guidance = "match",
    unknown: Unknown = "refuse",
    max_shard_size: str | int = "10GB",
    overwrite: bool = False,
    verify: bool = False,
    parts: PipelineParts | None = None,
) -> None:
    """Write weights in another format; complete, or not at all.

    By one process, also where several are joined: it asks no other.

    Args:
        source: what is converted; a path is opened with `args`, `guidance` and `unknown`.
        target: a folder for "dcp", "diffusers" and "pipeline", a `.safetensors` file for "bfl" and
            "comfyui". Checksums, licence and model card go into the folder, or beside the file
            under its name.
        format: what is written.
        dtype: element type; None keeps what each parameter has.
        max_shard_size: of the files of a diffusers folder, as "10GB".
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
    if format not in TARGET_FORMATS:
        raise ValueError(f"{format!r} is no format to write; take {', '.join(TARGET_FORMATS)}")
    _check_name(target, format)
    if not isinstance(source, Weights):
        source = open_weights(source, args, guidance, alone=True, unknown=unknown)
    job = _Job(source, dtype, parse_size(max_shard_size))
    pipeline = pipeline_plan(source, parts) if format == "pipeline" else None
    needed = job.bytes + (pipeline.bytes if pipeline else 0)
    reads = [source.path, *(pipeline.reads if pipeline else ())]
    files = travelling_files(source, format, target, dtype)
    stated = None if pipeline else stated_scheduler(source.path)
    if stated is not None and format in ("dcp", "diffusers"):
        files[SCHEDULER_FILE] = stated.text.encode()
    beside, outdated = [], []
    if format in ("bfl", "comfyui"):
        beside = [f"{target.stem}.{name}" for name in (*files, CHECKSUMS)]
        outdated = _companions(target)
    with staged(target, needed, overwrite, reads, beside, outdated) as stage:
        made = stage / target.name
        logger.info(f"Writing {target}: {job.bytes / 1e9:.2f} GB of weights")
        if format == "dcp":
            _write_dcp(job, made, files)
        elif format in ("bfl", "comfyui"):
            prefix = COMFYUI_PREFIX if format == "comfyui" else ""
            metadata = {} if stated is None else {SCHEDULER_KEY: stated.text}
            _write_single(job, made, prefix, metadata, files)
        else:
            made.mkdir()
            inner = made
            copied: dict[str, str] = {}
            if pipeline is not None:
                copied = pipeline.write(made)
                inner = made / "transformer"
                inner.mkdir()
            names = _write_diffusers(job, inner)
            sums = {str((inner / name).relative_to(made)): one for name, one in names.items()}
            for name, content in files.items():
                (made / name).write_bytes(content)
            _write_checksums(made / CHECKSUMS, made, copied | sums)
            if verify and pipeline is not None:
                compare_parts(pipeline, made, copied)
        if verify:
            compare_written(job, made)
    logger.info(f"Wrote {target}" + (", verified: every tensor is bit-equal" if verify else ""))


@dataclass(frozen=True)
class _Job:
    """What is written, in which element types."""

    weights: Weights
    dtype: torch.dtype | None
    shard_bytes: int

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """By our names."""
        return {name: self.dtype or one for name, one in self.weights.dtypes.items()}

    @property
    def specs(self) -> Specs:
        """By our names."""
        return {name: (self.dtypes[name], shape) for name, shape in self.weights.shapes.items()}

    @property
    def bytes(self) -> int:
        """Of all weights, in any layout."""
        return total_bytes(self.specs)

    def read(self, name: str) -> Tensor:
        """A parameter as it is written.

        Raises:
            UnreadableWeights: its values do not fit into the element type.
        """
        return self.weights.read(name, dtype=self.dtypes[name])

    def foreign_specs(self, layout: Layout) -> Specs:
        """By the names of a layout, in its order."""
        entries = layout_entries(layout, self.weights.args)
        shapes, dtypes = foreign_shapes(self.weights.args, entries), self.dtypes
        return {
            name: (dtypes[entry.ours], shapes[name]) for entry in entries for name in entry.theirs
        }

    def send(self, layout: Layout, write: Callable[[str, Tensor], None]) -> None:
        """Every tensor of a layout in its order; only one of ours is held, with its pieces."""
        with _progress(self.bytes) as done:
            for entry in layout_entries(layout, self.weights.args):
                pieces = entry.split(self.read(entry.ours))
                for name in entry.theirs:
                    tensor = pieces.pop(0).contiguous()
                    write(name, tensor)
                    done(tensor)
                    del tensor


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Tensor], None]]:
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:

        def done(tensor: Tensor) -> None:
            bar.update(tensor.nbytes)

        yield done


# ---- the formats ---------------------------------------------------------------------------


def _write_dcp(job: _Job, folder: Path, files: Mapping[str, bytes]) -> None:
    weights, step = job.weights, 0
    facts = RunFacts(
        seed=0,
        global_batch_size=1,
        context_in_dim=weights.args.context_in_dim,
        vec_in_dim=weights.args.vec_in_dim,
        in_channels=weights.args.in_channels,
        depth=weights.args.depth,
        depth_single_blocks=weights.args.depth_single_blocks,
    )
    if weights.format == "dcp":
        manifest = Manifest.read(weights.path)
        step, facts = manifest.step, manifest.facts
    stated = json.dumps(asdict(weights.args), indent=1).encode()
    with _progress(job.bytes) as done:

        def read(name: str) -> Tensor:
            value = job.read(name)
            done(value)
            return value

        beside = {**files, architecture.ARGS_FILE: stated}
        write_checkpoint(folder, job.specs, read, step, facts, beside)


def _write_single(
    job: _Job,
    path: Path,
    prefix: str,
    metadata: Mapping[str, str],
    files: Mapping[str, bytes],
) -> None:
    specs = {prefix + name: spec for name, spec in job.foreign_specs("bfl").items()}
    metadata = {**architecture.to_metadata(job.weights.args), **metadata}
    with TensorsWriter(path.parent, path.stem, specs, metadata) as writer:
        job.send("bfl", lambda name, tensor: writer.write(prefix + name, tensor))
    for name, content in files.items():
        (path.parent / f"{path.stem}.{name}").write_bytes(content)
    _write_checksums(path.parent / f"{path.stem}.{CHECKSUMS}", path.parent, writer.sha256)


def _write_diffusers(job: _Job, folder: Path) -> dict[str, str]:
    """A transformer folder; returns the checksums of its weights by file name."""
    config = architecture.to_diffusers_config(job.weights.args)
    specs, metadata = job.foreign_specs("diffusers"), architecture.to_metadata(job.weights.args)
    with TensorsWriter(folder, WEIGHTS_NAME, specs, metadata, job.shard_bytes) as writer:
        job.send("diffusers", writer.write)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return writer.sha256


def _write_checksums(path: Path, folder: Path, known: Mapping[str, str]) -> None:
    """A file that `sha256sum -c` reads, of everything in `folder`."""
    names = sorted(
        str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file() and one != path
    )
    sums = {name: known.get(name) or sha256(folder / name) for name in names}
    path.write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def _companions(target: Path) -> list[str]:
    """Names that the checksums beside an earlier single file tell of; the file's own is not one."""
    path = target.with_name(f"{target.stem}.{CHECKSUMS}")
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    names = [line.partition("  ")[2] for line in lines]
    begin = f"{target.stem}."
    return [n for n in names if n.startswith(begin) and Path(n).name == n and n != target.name]


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _check_name(target: Path, format: TargetFormat) -> None:
    if format in ("bfl", "comfyui") and target.suffix != ".safetensors":
        raise TargetRefused(
            f"{target} is to be a single file in format {format}: name it *.safetensors "
            "(flux1-*.safetensors, so that its folder is recognised)"
        )
    if format not in ("bfl", "comfyui") and target.suffix in SAFETENSORS:
        raise TargetRefused(f"{target} is to be a folder in format {format}; leave out the suffix")


# ---- verification --------------------------------------------------------------------------


def compare_written(job: _Job, written: Path) -> None:
    """Read an export back; UnreadableWeights names the parameters that are not bit-equal."""
    found = open_weights(written, job.weights.args, alone=True)
    wrong = []
    with _progress(job.bytes) as done:
        for name in job.weights.shapes:
            expected = job.read(name)
            if found.dtypes[name] != expected.dtype or not same_bits(found.read(name), expected):
                wrong.append(name)
            done(expected)
    if wrong:
        raise UnreadableWeights(
            f"what was written differs from {job.weights.path} in {len(wrong)} parameters "
            f"({wrong[0]} first); the disk or the memory is at fault, nothing was kept"
        )


def compare_parts(pipeline: PipelinePlan, written: Path, copied: Mapping[str, str]) -> None:
    """Read back what stands beside a transformer; UnreadableWeights names what is not as it was.

    Args:
        pipeline: what was written.
        written: its folder.
        copied: checksums of the files that were copied, by name.
    """
    for name, digest in copied.items():
        if sha256(written / name) != digest:
            raise UnreadableWeights(
                f"the copy {name} differs from {pipeline.copies[name]}; the disk or the memory is "
                "at fault, nothing was kept"
            )
    check_vae(open_autoencoder(pipeline.autoencoder), written / "vae")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN included."""
    return a.shape == b.shape and torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )
