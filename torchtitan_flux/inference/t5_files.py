"""A T5's weights where they lie, read one at a time; transformers would load all at once."""

from pathlib import Path

import torchtitan_flux.engine  # noqa: F401  (before torchtitan)

from huggingface_hub import snapshot_download
from torch import Tensor

from torchtitan_flux.checkpoint.safetensors_file import (
    TensorsFile,
    UnreadableWeights,
    read_weight_map,
)
from torchtitan_flux.encoders.pretrained import T5_KEY, locate, refusal

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
"""Names of one and the same tensor; files have either or both."""


class T5Files:
    """The safetensors files of a T5.

    Args:
        path: local folder, or a name on the hub.

    Raises:
        FileNotFoundError, ValueError: there are none, or they are damaged, naming the TOML key.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        name = locate(path, T5_KEY)["pretrained_model_name_or_path"]
        try:
            folder = Path(name)
            if not folder.is_dir():
                folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
            self._files = {
                tensor: file for file in map(TensorsFile.open, _files(folder))
                for tensor in file.shapes
            }  # fmt: skip
        except (OSError, ValueError) as error:
            raise refusal(T5_KEY, path, "weights", error) from None

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own, in the type of the file.

        Raises:
            ValueError: the files do not hold it.
        """
        names = _EMBEDDINGS if name in _EMBEDDINGS else (name,)
        found = next((one for one in names if one in self._files), None)
        if found is None:
            raise refusal(T5_KEY, self._path, "weights", f"missing: {name}")
        values = self._files[found].tensor(found).clone()
        self._files[found].release(found)
        return values


def _files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        names = set(read_weight_map(folder / _INDEX).values())
        if not names:
            raise UnreadableWeights(f"{folder / _INDEX}: its weight_map is no table of file names")
        return [folder / name for name in sorted(names)]
    return [folder / _SINGLE]
