"""Relative paths of the configuration: the caller's folder first, then the repository."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOTS = (PACKAGE.parent, PACKAGE)
"""The repository, whose top-level folders link into the package; the package where only a wheel
is installed."""

_ABSENT = "does not exist"


def locate(path: str) -> Path | None:
    """The existing file or folder that `path` means, or None.

    An absolute path is itself; a relative one is looked up from the current folder, then from the
    repository, then from the installed package.
    """
    # os.path.exists: Path.exists raises where a name is too long or a folder may not be entered
    return next((one for one in _places(path) if os.path.exists(one)), None)


def resolved_path(path: str) -> str:
    """The local file or folder that `path` means, or `path` itself as a hub name."""
    found = locate(path)
    return path if found is None else str(found)


def absence(path: str | Path) -> str:
    """What to say of a path that `locate` did not find: that it is a broken link, or not there."""
    link = next((one for one in _places(str(path)) if os.path.islink(one)), None)
    return f"is a link to {os.readlink(link)}, which does not exist" if link else _ABSENT


def why_absent(path: str | Path) -> str:
    """`absence`, and for a name on the hub the command that downloads its weights."""
    why, name = absence(path), str(path)
    local = "/" not in name or "safetensors" in name or Path(name.split("/")[0]).exists()
    if local or not is_hub_name(name):
        return why
    return (
        f"{why} here; what the hub has is downloaded first: `python scripts/download_hf_assets.py "
        f"--repo_id {name} --assets transformer --hf_token <token>`, then name "
        f"assets/hf/{name.split('/')[1]}/transformer"
    )


def is_hub_name(name: str) -> bool:
    """Whether a repository on the Hugging Face hub can have this name: "name" or "owner/name"."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def looks_local(path: str) -> bool:
    """Whether a name that was not found can only have meant a file, not a hub repository."""
    link = absence(path) != _ABSENT
    return link or path.startswith("assets/") or not is_hub_name(path)


def _places(path: str) -> list[Path]:
    """Where a path of the configuration may lie, the first place first."""
    given = Path(os.path.expanduser(path))  # Path.expanduser raises where there is no such user
    return [given] if given.is_absolute() else [root / given for root in (Path.cwd(), *ROOTS)]
