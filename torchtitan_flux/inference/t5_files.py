"""A T5's weights on the pages of their files, for reading one at a time.

The safetensors library maps a file as memory to be written to, for which the machine must have
room: a T5 that is streamed may be larger than that.
"""

from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torch import Tensor

from torchtitan_flux.tensor_files.safetensors_file import TensorsFile


class Pages:
    """Reads tensors of safetensors files; what was read does not stay in memory."""

    def __init__(self) -> None:
        self._files: dict[Path, TensorsFile] = {}

    def __call__(self, file: Path, name: str) -> Tensor:
        """A tensor in memory of its own, in the type of the file.

        Raises:
            UnreadableWeights, OSError: the file is damaged or cannot be opened.
        """
        if file not in self._files:
            self._files[file] = TensorsFile.open(file)
        values = self._files[file].tensor(name).clone()
        self._files[file].release(name)
        return values
