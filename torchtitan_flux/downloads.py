"""Files of a Hugging Face repository: sizes first, then huggingface_hub's own download.

scripts/download_hf_assets.py where only a wheel is installed: python -m torchtitan_flux.downloads
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from torchtitan_flux.files import try_lock
from torchtitan_flux.formatting import format_bytes, listed
from torchtitan_flux.paths import PACKAGE, locate
from torchtitan_flux.tensor_files.file_kinds import PICKLES

NOT_FETCHED = (*PICKLES, ".msgpack", ".h5")
TOKENIZER = "tokenizer.json tokenizer_config.json tokenizer.model spiece.model vocab.txt vocab.json"
KINDS = {
    "tokenizer": (*TOKENIZER.split(), "merges.txt", "special_tokens_map.json"),
    "safetensors": ("*.safetensors", "*.safetensors.index*.json"),
    "index": ("*.safetensors.index*.json",),
    "config": ("config.json", "generation_config.json"),
}
"""What --assets means where the repository has no such folder, as in torchtitan's script."""

OPTIONS = {
    "repo_id": {"required": True, "help": "such as black-forest-labs/FLUX.1-dev"},
    "assets": {"nargs": "+", "default": [], "help": f"folders, or kinds: {', '.join(KINDS)}"},
    "additional_patterns": {"nargs": "+", "default": [], "help": "files: ae.safetensors '*.json'"},
    "all": {"action": "store_true", "help": "every file of the repository"},
    "local_dir": {"type": Path, "help": "where the repository's folder goes (assets/hf)"},
    "revision": {"help": "branch, tag or commit (main)"},
    "hf_token": {"help": "default: HF_TOKEN, then the stored login"},
    "dry_run": {"action": "store_true", "help": "list files and sizes, fetch nothing"},
}
"""As of torchtitan's own script."""


class DownloadError(Exception):
    """One message; `status` 2 before anything was fetched, 1 afterwards."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, download, and end with an exit status; one message where it cannot be done."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if not (options.assets or options.additional_patterns or options.all):
        parser.error("say what to fetch: --assets, --additional_patterns or --all")
    try:
        download(options)
    except DownloadError as error:
        print(error, file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("\nstopped; the same command fetches what is missing", file=sys.stderr)
        sys.exit(1)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="download_hf_assets.py",
        description="Fetch files of a Hugging Face repository; pickles never.",
        epilog="Exit status: 0 all is there and right; 2 nothing was fetched; 1 stopped on the way",
    )
    for name, arguments in OPTIONS.items():
        parser.add_argument(f"--{name}", **arguments)
    return parser


def default_folder() -> Path:
    """assets/hf: the one that configurations read, else in the checkout, else here."""
    checkout = PACKAGE.parent
    parent = checkout if (checkout / "pyproject.toml").exists() else Path.cwd()
    return locate("assets/hf") or parent / "assets" / "hf"


def download(options: argparse.Namespace) -> None:
    """Say what will be fetched and how much it is, check access and space, fetch and verify it."""
    repo, token, status = options.repo_id, options.hf_token, 2
    try:
        info = HfApi(token=token).model_info(repo, revision=options.revision, files_metadata=True)
        files = info.siblings or []
        chosen = choose(files, options.assets, options.additional_patterns, options.all)
        parent = default_folder() if options.local_dir is None else options.local_dir.expanduser()
        folder = (parent / repo.split("/")[-1]).absolute()
        print(f"{repo} at {info.sha}, to {folder}")
        missing = [file for file in chosen if not is_right(folder / file.rfilename, file)]
        for file in chosen:
            state = "" if file in missing else "  is here"
            print(f"{format_bytes(file.size or 0):>10}  {file.rfilename}{state}", flush=True)
        if missing:  # anyone may list a gated repository, not read it
            url = hf_hub_url(repo, missing[0].rfilename, revision=info.sha)
            get_hf_file_metadata(url, token=token)
        check_space(folder, sum(file.size or 0 for file in missing))
        if options.dry_run:
            return
        with _locked(folder):
            for file in missing:
                status, path = 1, folder / file.rfilename
                path.unlink(missing_ok=True)  # the hub's client trusts one of the right size
                hf_hub_download(
                    repo, file.rfilename, revision=info.sha, local_dir=folder, token=token
                )
                if not is_right(path, file):
                    path.unlink()
                    raise DownloadError(
                        f"{file.rfilename}: its checksum is wrong; it was deleted. Run the same "
                        "command again; if it happens twice, a proxy or the disk changes bytes",
                        status,
                    )
    except (HFValidationError, HTTPError, OSError, ValueError, TypeError) as error:
        raise DownloadError(_explained(error, repo), status) from error
    print(f"{len(chosen)} files, {format_bytes(sum(f.size or 0 for f in chosen))}: {folder}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second download out of the folder, and clear what a killed one left."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if try_lock(descriptor) is False:
            raise DownloadError(f"another download is writing to {folder}: wait for it")
        for leftover in folder.glob(".cache/huggingface/download/**/*.incomplete"):
            leftover.unlink()  # never resumed by huggingface_hub, and up to 24 GB
        yield
    finally:
        os.close(descriptor)


def choose(
    files: Sequence[RepoSibling], assets: Sequence[str], patterns: Sequence[str], everything: bool
) -> list[RepoSibling]:
    """The files that are meant, without pickles; DownloadError with all that cannot be meant.

    A pattern with a slash is matched against the whole path, one without against the file name.
    """
    names = [file.rfilename for file in files]
    problems = [
        f"the repository holds a file named {name}: refused"
        for name in names
        if name.startswith("/") or ".." in PurePosixPath(name).parts
    ]
    folders = {name.split("/")[0] for name in names if "/" in name}
    wanted = [("--additional_patterns", pattern, (pattern,)) for pattern in patterns]
    for asset in (asset.rstrip("/") for asset in assets):
        globs = (f"{asset}/*",) if asset in folders else KINDS.get(asset, ())
        wanted.append(("--assets", asset, globs))
    chosen = set(names) if everything else set()
    for flag, given, globs in wanted:
        found = {
            name
            for name in names
            for glob in globs
            if fnmatchcase(name if "/" in glob else PurePosixPath(name).name, glob)
        }
        if not found:
            near = get_close_matches(given, [*folders, *names], n=3, cutoff=0.5)
            hint = f"near: {', '.join(near)}" if near else f"it has: {listed(names)}"
            problems.append(f"{flag} {given}: no such file or folder in the repository ({hint})")
        elif all(name.endswith(NOT_FETCHED) for name in found):
            problems.append(f"{flag} {given}: a pickle, which can run code; fetch the safetensors")
        chosen |= found
    if problems:
        raise DownloadError("\n".join(problems))
    return [f for f in files if f.rfilename in chosen and not f.rfilename.endswith(NOT_FETCHED)]


def is_right(path: Path, file: RepoSibling) -> bool:
    """Whether `path` holds exactly this file: its sha256, or git's checksum of a small one."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if not file.lfs:
        return git_hash(path.read_bytes()) == file.blob_id
    with path.open("rb") as content:
        return sha_fileobj(content).hex() == file.lfs.sha256


def check_space(folder: Path, need: int) -> None:
    """Say what is needed and free, in bytes; raise DownloadError where it does not fit."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir():
        raise DownloadError(f"{there} is no folder: change --local_dir")
    free = shutil.disk_usage(there).free
    print(f"to fetch: {format_bytes(need)}; free: {format_bytes(free)}", flush=True)
    if need > free:
        raise DownloadError(
            f"not enough space in {folder}: {format_bytes(need)} needed, {format_bytes(free)} "
            "free; make room, or name another disk with --local_dir"
        )


_EXPLAINED = {
    HFValidationError: "--repo_id {repo}: a repository is named owner/name",
    OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, so nothing is downloaded: unset HF_HUB_OFFLINE",
    GatedRepoError: "{repo} is gated: accept its licence on {hub}/{repo}, and give a token that "
    "may read it as --hf_token, as HF_TOKEN, or by `hf auth login`",
    RevisionNotFoundError: "--revision: {repo} has no such branch, tag or commit",
    RepositoryNotFoundError: "{repo}: no such repository, or it needs a token (--hf_token, "
    "HF_TOKEN, `hf auth login`); the hub does not tell strangers which",
    HfHubHTTPError: "the hub answered with status {status}: {error}; later, the same command",
    HTTPError: "no connection to {hub} ({error}): check the network, HTTPS_PROXY and HF_ENDPOINT",
    OSError: "{error}; the same command fetches what is missing",
    Exception: "{hub} does not answer like a hub ({error}): check HF_ENDPOINT",
}
"""What an error of the hub's client means and what to do about it; the first that fits."""


def _explained(error: Exception, repo: str) -> str:
    hub, status = constants.ENDPOINT, 0
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401 and not isinstance(error, RepositoryNotFoundError):
            return f"the hub refuses the token: make a new one at {hub}/settings/tokens"
    text = next(text for kind, text in _EXPLAINED.items() if isinstance(error, kind))
    return text.format(repo=repo, hub=hub, status=status, error=error)


if __name__ == "__main__":
    main()
