"""DCP's storage with a manifest: written last, and read back without running foreign code."""

import pickle
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from torchtitan_flux.checkpoint.folder import put_in_place
from torchtitan_flux.checkpoint.manifest import FileFacts, Manifest, file_facts
from torchtitan_flux.collectives import gather
from torchtitan_flux.files import DiskFull, disk_full
from torchtitan_flux.formatting import listed
from torchtitan_flux.tensor_files.state_dict_keys import check_keys

METADATA = ".metadata"
EMA_PREFIX = "ema."
"""Before the decay of an average: ema.0.999.img_in.weight."""
NOT_MODEL = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.", EMA_PREFIX)
"""Prefixes of the entries of a checkpoint that are not weights."""


def partial_of(folder: Path) -> Path:
    """Where a checkpoint lies while it is written."""
    return folder.with_name(f"{folder.name}.partial")


class Written(list[WriteResult]):
    """What one rank tells the coordinator after writing, with the facts of its files."""

    files: dict[str, FileFacts]


class ManifestWriter(FileSystemWriter):
    """Writes `<folder>.partial`; `finish` adds the manifest and renames it.

    DCP calls that on one rank, after every rank has written: a checkpoint has its name only when
    all of it is on the disk. The facts of the files travel with DCP's own results.

    Args:
        folder: what the checkpoint will be called.
        manifest: but for its files.
        replaces_damaged: one that lies there is known to be damaged, and set aside.
        companions: further files that the manifest covers.
        file_per_tensor: and only one tensor is held; else a file for each rank.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        replaces_damaged: bool = False,
        companions: Mapping[str, bytes] | None = None,
        file_per_tensor: bool = False,
    ):
        super().__init__(partial_of(folder), single_file_per_rank=not file_per_tensor)
        self.folder, self.manifest = folder, manifest
        self.replaces_damaged = replaces_damaged
        self.companions = companions or {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Unpickled in the process that saves in the background: it is needed until the ranks end
        # it, while Slurm and torchrun signal every process.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        vars(self).update(state)

    @contextmanager
    def _names_full_disk(self) -> Iterator[None]:
        """On the rank that met it, and at once: what it wrote is removed later."""
        try:
            yield
        except Exception as error:
            if full := disk_full(error, Path(self.path)):
                raise full from error
            raise

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        with self._names_full_disk():
            return super().prepare_local_plan(plan)

    def write_data(self, plan: Any, planner: Any) -> Future:
        with self._names_full_disk():
            results = super().write_data(plan, planner).wait()
        written = Written(results)
        names = sorted({result.storage_data.relative_path for result in results})
        written.files = {name: file_facts(Path(self.path) / name) for name in names}
        future: Future = Future()
        future.set_result(written)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with self._names_full_disk():
            super().finish(metadata, results)
            folder = Path(self.path)
            for name, content in self.companions.items():
                (folder / name).write_bytes(content)
            files = {name: file_facts(folder / name) for name in (METADATA, *self.companions)}
            for of_rank in results:
                assert isinstance(of_rank, Written)
                files |= of_rank.files
            replace(self.manifest, created=time.time(), files=files).write(folder)
            put_in_place(folder, self.folder, self.replaces_damaged)


class _MetadataUnpickler(pickle.Unpickler):
    """Builds what DCP's own metadata consist of, and nothing else."""

    MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    CLASSES = (
        *("Metadata", "MetadataIndex", "StorageMeta", "_StorageInfo", "TensorProperties"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        "_MEM_FORMAT_ENCODING",
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member  # how Python 3.11.0 to 3.11.3 pickle a member of an enum
        if module in ("pathlib", "pathlib._local") and name == "PosixPath":
            return type(Path())  # Python 3.13 has its paths in pathlib._local, others lack it
        known = (
            (module in self.MODULES and name in self.CLASSES)
            or (module, name) in (("torch", "Size"), ("torch.serialization", "_get_layout"))
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
            or (module, name) == ("collections", "OrderedDict")
        )
        if not known:
            raise pickle.UnpicklingError(
                f"{METADATA} names {module}.{name}, which no checkpoint of DCP needs"
            )
        return super().find_class(module, name)


def _member(enum: Any, name: str) -> Any:
    """getattr, of enums that DCP's metadata consist of and nothing else."""
    if not (isinstance(enum, type) and issubclass(enum, Enum)):
        raise pickle.UnpicklingError(f"{METADATA} asks for {name!r} of {enum!r}, which is no enum")
    return enum[name]


class SafeReader(FileSystemReader):
    """DCP's reader, with metadata that cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _SafePlanner(DefaultLoadPlanner):
    """DCP's planner, with values (steps, rates) that cannot run code."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        torch.load(value, weights_only=True)  # DCP's would unpickle anything
        value.seek(0)
        super().load_bytes(read_item, value)


def load_states(states: dict[str, Any], model_keys: set[str], folder: Path) -> None:
    """Fill `states` from a checkpoint, in place; collective.

    Raises:
        KeyMismatch: the weights (`model_keys`) of all ranks are not exactly the checkpoint's.
        RuntimeError: something else is missing or cannot be read.
    """
    reader = SafeReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    found = {
        name: tuple(entry.size)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith(NOT_MODEL)
    }
    if model_keys:
        wanted = {name: tuple(states[name].shape) for name in model_keys}
        if not all(gather(found.keys() == wanted.keys())):  # stages of a pipeline have a part each
            wanted = {name: shape for of_rank in gather(wanted) for name, shape in of_rank.items()}
        check_keys(found, wanted, str(folder))
    try:
        dcp.load(states, storage_reader=reader, planner=_SafePlanner())
    except CheckpointException as error:  # no Exception, so that few would catch it
        raise RuntimeError(f"{folder} could not be loaded ({causes_of(error)})") from error


def causes_of(error: CheckpointException) -> str:
    """What went wrong on which ranks, in a line."""
    ranks: dict[str, list[int]] = {}
    for rank, (cause, _) in sorted(error.failures.items()):
        kind = "" if isinstance(cause, DiskFull) else f"{type(cause).__name__}: "
        ranks.setdefault(f"{kind}{cause}", []).append(rank)
    return "; ".join(f"ranks {listed(of)}: {cause}" for cause, of in ranks.items())


def read_states(folder: Path) -> dict[str, Any]:
    """Everything in a checkpoint by its flat name, in the memory of this process alone."""
    reader = SafeReader(folder)
    states: dict[str, Any] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        tensor = isinstance(entry, TensorStorageMetadata)
        states[name] = torch.empty(entry.size, dtype=entry.properties.dtype) if tensor else None
    dcp.load(states, storage_reader=reader, planner=_SafePlanner(), no_dist=True)
    return states
