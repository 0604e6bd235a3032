"""Which files of a folder, or of a repository on the hub, hold the weights of a text encoder."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from torchtitan_flux.encoders.pretrained import locate
from torchtitan_flux.formatting import listed
from torchtitan_flux.tensor_files import file_sets

_STEM = "model"
SINGLE = f"{_STEM}.safetensors"
INDEX = f"{SINGLE}.index.json"


def weight_files(path: str | Path, key: str) -> list[Path]:
    """The safetensors files of an encoder: one, or those of an index.

    Of a repository on the hub they are fetched; variants are not looked for there.

    Raises:
        FileNotFoundError: no such folder, nor can `path` be a name on the hub; a file is missing.
        OSError, ValueError: the hub cannot be asked; the index is none; there are several variants.
    """
    name = locate(path, key)["pretrained_model_name_or_path"]
    if Path(name).is_dir():
        return files_in(Path(name))[0]
    if (single := _fetched(name, SINGLE)) is not None:
        return [single]
    if (index := _fetched(name, INDEX)) is None:
        raise FileNotFoundError(f"there is no {SINGLE} and no {INDEX} (pickles are not read)")
    shards = {
        one: _fetched(name, one) for one in sorted(set(file_sets.read_weight_map(index).values()))
    }
    if missing := [one for one, shard in shards.items() if shard is None]:
        raise FileNotFoundError(f"{INDEX} names {listed(missing)}, which is not there")
    return [shard for shard in shards.values() if shard is not None]


def files_in(folder: Path) -> tuple[list[Path], Path | None]:
    """The weights in a local folder, and their index where they have one.

    A variant, such as fp16, counts where the plain files are not there; one file before shards, as
    transformers has it. Shards need no index.

    Raises FileNotFoundError, ValueError: there are none, or several variants; a shard is missing.
    """
    there = file_sets.weight_files(folder)
    found = [one for one in there if one.stem == _STEM]
    if not found:
        pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        hint = f"; {pickles[0]} is not read, for it could run code" if pickles else ""
        others = ", ".join(one.shown for one in there)
        hint += f"; what it holds is named otherwise: {others}" if others else ""
        raise FileNotFoundError(f"{folder / SINGLE} does not exist, nor an index of shards{hint}")
    if len(found) > 1:
        names = ", ".join(one.shown for one in found)
        raise ValueError(f"{folder} holds several variants: {names}; keep one of them there")
    (files,) = found
    for name in files.names:
        if file_sets.shard_count(folder / name) == 1:
            return [folder / name], None
    return files.paths(), folder / files.index if files.index else None


def _fetched(repository: str, name: str) -> Path | None:
    """A file of a repository on the hub; None where it has none."""
    try:
        return Path(hf_hub_download(repository, name))
    except EntryNotFoundError:  # also where it is not in the cache and the hub is not asked
        return None
