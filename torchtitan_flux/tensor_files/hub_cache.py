"""Names of repositories on the Hugging Face hub, and the folders of its cache, as weights."""

import re
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from torchtitan_flux.formatting import listed
from torchtitan_flux.paths import absence
from torchtitan_flux.tensor_files.safetensors_file import (
    PICKLES,
    SAFETENSORS,
    UnreadableWeights,
)

_CACHE = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_REPOSITORY = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/transformer)?")
_ADDRESS = re.compile(r"https?:/+[^/]+/([\w.-]+/[\w.-]+)(?:/.*)?")


def why_absent(path: str | Path) -> str:
    """What to say of weights that are not there: how a path goes on that names them.

    A name on the hub, or an address there, gets the command that downloads it.
    """
    said, text = absence(path), str(path)
    address = _ADDRESS.fullmatch(text)
    if address is not None:
        repository = address[1]
    elif (named := _REPOSITORY.fullmatch(text)) and not _means_local(text):
        repository = named[1]
    else:
        return said
    cached = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    if cached.is_dir():
        return f"{said} here; the hub's cache has it: name {cached}"
    how = download_command(repository)
    return f"{said} here; what the hub has is downloaded first: {how}"


def _means_local(text: str) -> bool:
    """Whether a name can only mean a file here, or something in a folder that is here."""
    return text.endswith((*SAFETENSORS, *PICKLES, ".gguf")) or Path(text.split("/")[0]).exists()


def download_command(repository: str) -> str:
    """How to get the transformer of a repository, and what to name then."""
    name = repository.split("/")[1]
    return (
        f"`python scripts/download_hf_assets.py --repo_id {repository} --assets transformer "
        f"--hf_token <token>`, then name assets/hf/{name}/transformer"
    )


def snapshot_of(folder: Path) -> Path:
    """The files of a repository in the hub's cache; any other folder is itself.

    Args:
        folder: such as `models--black-forest-labs--FLUX.1-dev`, or `snapshots` in it.

    Raises:
        UnreadableWeights: it holds none, or several without saying which is the newest.
    """
    if folder.name == "snapshots" and _CACHE.fullmatch(folder.resolve().parent.name):
        folder = folder.parent
    found = _CACHE.fullmatch(folder.resolve().name)
    if found is None:
        return folder
    main = folder / "refs" / "main"
    if main.is_file():
        named = folder / "snapshots" / main.read_text().strip()
        if named.is_dir():
            return named
    there = sorted(one for one in folder.glob("snapshots/*") if one.is_dir())
    if len(there) == 1:
        return there[0]
    if there:
        raise UnreadableWeights(
            f"{folder} holds several snapshots; give one: {listed(str(one) for one in there)}"
        )
    how = download_command(f"{found['owner']}/{found['name']}")
    raise UnreadableWeights(
        f"{folder} is a folder of the hub's cache without any snapshot: the download did not end; "
        f"get it by {how}"
    )


def repository_of(folder: Path) -> str:
    """The repository whose snapshot a folder is or lies in; empty for any other folder."""
    for one in (folder, *folder.absolute().parents):
        if found := _CACHE.fullmatch(one.name):
            return f"{found['owner']}/{found['name']}"
    return ""
