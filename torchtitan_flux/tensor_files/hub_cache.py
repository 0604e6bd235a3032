"""Names of repositories on the Hugging Face hub, and the folders of its cache, as weights."""

import re
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from torchtitan_flux.formatting import listed
from torchtitan_flux.paths import absence, is_hub_name
from torchtitan_flux.tensor_files.file_kinds import PICKLES
from torchtitan_flux.tensor_files.safetensors_file import SAFETENSORS, UnreadableWeights

_CACHE = re.compile(r"models--(.+?)--(.+)")
_ADDRESS = re.compile(r"https?:/+[^/]+/([\w.-]+/[\w.-]+)(?:/.*)?")


def why_absent(path: str | Path) -> str:
    """How a message goes on that names a path where no weights are.

    A name on the hub, or an address there, gets the command that downloads it.
    """
    why, text = absence(path), str(path)
    address = _ADDRESS.fullmatch(text)
    repository = address[1] if address else text.removesuffix("/transformer")
    # a name may also mean a file, or something in a folder that is here
    local = text.endswith((*SAFETENSORS, *PICKLES, ".gguf")) or Path(text.split("/")[0]).exists()
    if not address and (local or "/" not in repository or not is_hub_name(repository)):
        return why
    cached = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    if cached.is_dir():
        return f"{why} here; the hub's cache has it: name {cached}"
    return f"{why} here; what the hub has is downloaded first: {download_command(repository)}"


def download_command(repository: str) -> str:
    """How to get the transformer of a repository, and what to name then."""
    name = repository.split("/")[1]
    return (
        f"`python scripts/download_hf_assets.py --repo_id {repository} --assets transformer "
        f"--hf_token <token>`, then name assets/hf/{name}/transformer"
    )


def snapshot_of(folder: Path) -> Path:
    """The files of a repository in the hub's cache; any other folder is itself.

    `folder` is such as `models--black-forest-labs--FLUX.1-dev`, or `snapshots` in it.
    UnreadableWeights: it holds none, or several without saying which is the newest.
    """
    if folder.name == "snapshots" and repository_of(folder.resolve().parent):
        folder = folder.parent
    if (found := _CACHE.fullmatch(folder.resolve().name)) is None:
        return folder
    main = folder / "refs" / "main"
    if main.is_file() and (named := folder / "snapshots" / main.read_text().strip()).is_dir():
        return named
    snapshots = sorted(one for one in folder.glob("snapshots/*") if one.is_dir())
    if len(snapshots) == 1:
        return snapshots[0]
    if snapshots:
        raise UnreadableWeights(f"{folder} holds several snapshots; give one: {listed(snapshots)}")
    raise UnreadableWeights(
        f"{folder} is a folder of the hub's cache without any snapshot: the download did not end; "
        f"get it by {download_command('/'.join(found.groups()))}"
    )


def repository_of(folder: Path) -> str:
    """The repository whose snapshot a folder is or lies in; empty for any other folder."""
    for one in (folder, *folder.absolute().parents):
        if found := _CACHE.fullmatch(one.name):
            return "/".join(found.groups())
    return ""
