"""Relative paths of the configuration: the caller's folder first, then the repository."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOTS = (PACKAGE.parent, PACKAGE)
"""The repository, whose top-level folders link into the package; the package where only a wheel
is installed."""


def locate(path: str) -> Path | None:
    """The existing file or folder that `path` means, or None.

    An absolute path is itself; a relative one is looked up from the current folder, then from the
    repository, then from the installed package.
    """
    given = Path(path).expanduser()
    # os.path.exists: Path.exists raises where a name is too long or a folder may not be entered
    if given.is_absolute():
        return given if os.path.exists(given) else None
    for root in (Path.cwd(), *ROOTS):
        if os.path.exists(root / given):
            return root / given
    return None


def looks_local(path: str) -> bool:
    """Whether a name that was not found can only have meant a file, not a hub repository.

    Hub names are "name" or "owner/name".
    """
    return path.startswith((".", "/", "~", "assets/")) or path.count("/") > 1
