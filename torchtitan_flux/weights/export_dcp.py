"""Weights of any format as a model-only checkpoint of ours, one tensor in memory at a time."""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from torchtitan_flux.checkpoint.manifest import Manifest, file_facts
from torchtitan_flux.checkpoint.storage import ManifestWriter, Written, causes_of
from torchtitan_flux.tensor_files.safetensors_writer import Specs

_FILE_BYTES = 2 * 2**30
"""A file that has this much is complete: ranks that verify the checkpoint share its files."""


def write_checkpoint(
    folder: Path,
    specs: Specs,
    read: Callable[[str], Tensor],
    manifest: Manifest,
    companions: Mapping[str, bytes],
) -> None:
    """A checkpoint that `checkpoint.initial_load_path` takes, written by this process alone.

    Args:
        folder: what the checkpoint will be called; does not exist.
        specs, read: of each parameter, by our name; `read` is called once for each.
        manifest: but for its files, to which `companions` belong too.
    """
    empty = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, (dtype, shape) in specs.items()
    }
    writer = _StreamingWriter(folder, manifest, companions)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(empty, storage_writer=writer, planner=_StreamingPlanner(read), no_dist=True)
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


class _StreamingWriter(ManifestWriter):
    """Holds one tensor at a time; DCP's own `write_data` keeps all until the last is written."""

    def __init__(self, folder: Path, manifest: Manifest, companions: Mapping[str, bytes]):
        super().__init__(folder, manifest)
        self._companions = companions

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future:
        written, files, waiting = Written(), {}, list(reversed(plan.items))
        while waiting:
            name = f"__0_{len(files)}.distcp"
            path = Path(self.path) / name
            with path.open("wb") as file:
                while waiting and (begin := file.tell()) < _FILE_BYTES:
                    item = waiting.pop()
                    torch.save(planner.resolve_data(item), file)
                    place = _StorageInfo(name, begin, file.tell() - begin)
                    written.append(WriteResult(item.index, place.length, place))
                file.flush()
                os.fsync(file.fileno())
            files[name] = file_facts(path)
        written.files = files
        future: Future = Future()
        future.set_result(written)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        for name, content in self._companions.items():
            path = Path(self.path) / name
            path.write_bytes(content)
            results[0].files[name] = file_facts(path)  # type: ignore[attr-defined]
        super().finish(metadata, results)
