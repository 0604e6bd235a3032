"""Tensors by name, read part by part: those of safetensors files, also under other names."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchtitan_flux.tensor_files.element_types import cast
from torchtitan_flux.tensor_files.safetensors_file import TensorsFile, UnreadableWeights
from torchtitan_flux.tensor_files.state_dict_keys import Shape

Box = tuple[slice, ...]


class Source:
    """Tensors by name; `headers` are the strings that files hold beside them."""

    headers: Sequence[Mapping[str, str]] = ()
    dtypes: dict[str, torch.dtype]
    shapes: dict[str, Shape]

    def part(self, name: str, box: Box) -> Tensor:
        """A part of a tensor: perhaps on the file's own pages, so never to be written to."""
        raise NotImplementedError

    def release(self, name: str) -> None:
        """Nothing of this tensor is needed for now."""

    def whole(self, name: str) -> Tensor:
        """All of a tensor, as `part` gives it."""
        return self.part(name, tuple(slice(0, size) for size in self.shapes[name]))

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """All of a tensor in memory of its own; BeyondRange where `dtype` cannot hold a value."""
        values = cast(self.whole(name), dtype or self.dtypes[name], name).clone()
        self.release(name)
        return values


class FilesSource(Source):
    """Safetensors files, each tensor in exactly one of them, or UnreadableWeights."""

    def __init__(self, files: Sequence[TensorsFile]) -> None:
        self._files: dict[str, TensorsFile] = {}
        self.headers = [file.metadata for file in files]
        self.dtypes, self.shapes = {}, {}
        for file in files:
            for name in file.shapes:
                if other := self._files.get(name):
                    raise UnreadableWeights(f"{name} is both in {other.path} and in {file.path}")
                self._files[name] = file
            self.dtypes |= file.dtypes
            self.shapes |= file.shapes

    def part(self, name: str, box: Box) -> Tensor:
        return self._files[name].tensor(name)[box]

    def release(self, name: str) -> None:
        self._files[name].release(name)


class RenamedSource(Source):
    """Another source by `names`: new name -> name there; what they do not mention is left out."""

    def __init__(self, source: Source, names: Mapping[str, str]) -> None:
        self._source, self._names, self.headers = source, names, source.headers
        self.dtypes = {new: source.dtypes[name] for new, name in names.items()}
        self.shapes = {new: source.shapes[name] for new, name in names.items()}

    def part(self, name: str, box: Box) -> Tensor:
        return self._source.part(self._names[name], box)

    def release(self, name: str) -> None:
        self._source.release(self._names[name])
