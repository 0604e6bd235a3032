"""The weights of a DCP checkpoint, read part by part whatever mesh they were saved from."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from torchtitan_flux.checkpoint.storage import EMA_PREFIX, NOT_MODEL, SafeReader
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.tensor_files.sources import Box, Source


class DcpSource(Source):
    """A checkpoint's weights, or with `average` (a decay of `ema.decay`) their average.

    `average` is "" where there is only one.

    Raises:
        UnreadableWeights: the metadata cannot be read, or name code; or there is no such average.
    """

    def __init__(self, folder: Path, average: str | None = None) -> None:
        self._reader, self._folder = SafeReader(folder), folder
        try:
            metadata = self._reader.read_metadata()
            entries = {
                name: entry
                for name, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            self._places = metadata.storage_data
        except Exception as error:  # a restricted unpickler meets anything
            raise UnreadableWeights(f"{folder} is no readable DCP checkpoint: {error}") from None
        self._stored = {name: name for name in entries if not name.startswith(NOT_MODEL)}
        if average is not None:
            self._stored |= _average(folder, entries, average)
