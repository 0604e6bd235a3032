"""A source whose scaled float8 weights are read as the numbers they stand for."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchtitan_flux.tensor_files.quantized import QuantizedWeights, dequantized, find_scales
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.weights.tensor_sources import Box, Source


class ScaledSource:
    """Another source without its scales: a `Source`, scaled weights in float32."""

    def __init__(self, source: Source, of: Mapping[str, str], beside: frozenset[str]) -> None:
        self._source, self._scales = source, of
        self.headers = source.headers
        self.shapes = {name: one for name, one in source.shapes.items() if name not in beside}
        self.dtypes = {
            name: torch.float32 if name in of else source.dtypes[name] for name in self.shapes
        }

    def part(self, name: str, box: Box) -> Tensor:
        """See `Source`; UnreadableWeights where a scale is no finite number."""
        stored = self._source.part(name, box)
        if name not in self._scales:
            return stored
        scale = _whole(self._source, self._scales[name])
        try:
            return dequantized(stored, scale, box[0] if box else slice(None), self._scales[name])
        except QuantizedWeights as error:
            raise UnreadableWeights(str(error)) from None

    def release(self, name: str) -> None:
        self._source.release(name)


def without_scales(path: Path, source: Source) -> Source:
    """The source with its scales applied; itself where it has none.

    Args:
        path: for messages.
        source: what was found there.

    Raises:
        UnreadableWeights: names a quantisation that is not read.
    """
    try:
        scales = find_scales(
            source.dtypes, source.shapes, source.headers, lambda name: _whole(source, name)
        )
    except QuantizedWeights as error:
        raise UnreadableWeights(f"{path} {error}") from None
    return ScaledSource(source, scales.of, scales.beside) if scales.beside else source


def _whole(source: Source, name: str) -> Tensor:
    return source.part(name, tuple(slice(0, size) for size in source.shapes[name]))
