"""Which files of a repository a command line means."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

KINDS = {
    "tokenizer": (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "spiece.model",
        "vocab.txt",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
    ),
    "safetensors": ("*.safetensors", "*.safetensors.index*.json"),
    "index": ("*.safetensors.index*.json",),
    "config": ("config.json", "generation_config.json"),
}
"""Kinds of files that torchtitan's own script knows, as patterns of file names."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Weights that run code when they are loaded; safetensors do not."""


class DownloadError(Exception):
    """A download that cannot be done; the message says why and what to change.

    `status` is the exit status: 2 where nothing was fetched, 1 where it stopped in the middle.
    """

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `digest` is its sha256 where `lfs`, else the sha1 of its git blob."""

    name: str
    size: int
    digest: str
    lfs: bool


@dataclass(frozen=True)
class Choice:
    """What is fetched, and the pickles that were meant too and are left where they are."""

    files: list[RemoteFile]
    left_out: list[RemoteFile]


def choose(
    files: Sequence[RemoteFile], assets: Sequence[str], patterns: Sequence[str], everything: bool
) -> Choice:
    """The files that `--assets`, `--additional_patterns` and `--all` mean, in their own order.

    An asset is a folder of the repository or, where it has no such folder, a kind of files
    (`KINDS`). A pattern with a slash is matched against the whole path, one without against the
    file name in any folder.

    Raises:
        DownloadError: something that no file answers to, with the nearest names, or only
            pickles. All of it in one message.
    """
    folders = sorted({file.name.split("/")[0] for file in files if "/" in file.name})
    wanted: list[tuple[str, str, Callable[[str], bool]]] = []  # flag, what it was given, test
    if everything:
        wanted.append(("--all", "", lambda name: True))
    problems = []
    for given in assets:
        asset = given.rstrip("/")
        if asset in folders:
            wanted.append(("--assets", asset, lambda name, top=asset: name.startswith(f"{top}/")))
        elif asset in KINDS:
            wanted.append(
                ("--assets", asset, lambda name, a=asset: any(matches(name, p) for p in KINDS[a]))
            )
        else:
            problems.append(
                f"--assets {asset}: neither a folder of the repository{_near(asset, folders)} nor "
                f"one of {', '.join(KINDS)}"
            )
    for pattern in patterns:
        wanted.append(("--additional_patterns", pattern, lambda name, p=pattern: matches(name, p)))

    chosen: set[str] = set()
    for flag, given, is_meant in wanted:
        found = [file.name for file in files if is_meant(file.name)]
        if not found:
            near = _near(given, [file.name for file in files])
            problems.append(f"{flag} {given}: no such file in the repository{near}")
        elif all(name.endswith(PICKLES) for name in found):
            problems.append(
                f"{flag} {given}: a pickle, which can run anything when it is loaded; only "
                "safetensors are fetched"
            )
        chosen.update(found)
    if problems:
        raise DownloadError("\n".join(problems))
    meant = [file for file in files if file.name in chosen]
    return Choice(
        files=[file for file in meant if not file.name.endswith(PICKLES)],
        left_out=[file for file in meant if file.name.endswith(PICKLES)],
    )


def matches(name: str, pattern: str) -> bool:
    """Whether the file `name` (a path in the repository) is meant by `pattern`."""
    return fnmatchcase(name if "/" in pattern else PurePosixPath(name).name, pattern)


def _near(given: str, names: Sequence[str]) -> str:
    """The names to show beside one that is not there."""
    by_lower = {name.lower(): name for name in names}
    by_lower.update({PurePosixPath(name).name.lower(): name for name in names})
    near = get_close_matches(given.lower(), by_lower, n=3, cutoff=0.5)
    if near:
        return f" (near: {', '.join(dict.fromkeys(by_lower[name] for name in near))})"
    more = ", …" if len(names) > 8 else ""
    return f" (it has: {', '.join(names[:8])}{more})" if names else " (it has none)"
