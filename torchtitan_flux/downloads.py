"""Files of a Hugging Face repository: sizes first, then huggingface_hub's own download.

scripts/download_hf_assets.py where only a wheel is installed: python -m torchtitan_flux.downloads
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HTTPError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash, sha_fileobj

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
    """One message about all that is in the way."""


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
        sys.exit(2)
    except (HTTPError, OSError, ValueError) as error:  # huggingface_hub says what is wrong
        print(
            f"{options.repo_id}: {error}\nA gated repository needs its licence accepted on the "
            "hub, and a token: --hf_token, HF_TOKEN or `hf auth login`. What has arrived stays: "
            "the same command fetches the rest.",
            file=sys.stderr,
        )
        sys.exit(1)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="download_hf_assets.py",
        description="Fetch files of a Hugging Face repository; pickles never.",
        epilog="Exit status: 0 all is there and right; 2 wrong options or no space; 1 not all came",
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
    repo, token = options.repo_id, options.hf_token
    info = HfApi(token=token).model_info(repo, revision=options.revision, files_metadata=True)
    chosen = choose(info.siblings or [], options.assets, options.additional_patterns, options.all)
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
    there = next(path for path in (folder, *folder.parents) if path.exists())
    need, free = sum(file.size or 0 for file in missing), shutil.disk_usage(there).free
    print(f"to fetch: {format_bytes(need)}; free: {format_bytes(free)}", flush=True)
    if need > free:
        raise DownloadError(f"not enough space in {folder}: make room, or name a --local_dir")
    if options.dry_run:
        return
    for file in missing:
        path = folder / file.rfilename
        path.unlink(missing_ok=True)  # the hub's client trusts one of the right size
        hf_hub_download(repo, file.rfilename, revision=info.sha, local_dir=folder, token=token)
        if not is_right(path, file):
            path.unlink()
            raise OSError(f"{file.rfilename}: its checksum is wrong; it was deleted")
    for leftover in (folder / ".cache").rglob("*.incomplete"):  # of a run that was killed
        leftover.unlink(missing_ok=True)
    print(f"{len(chosen)} files, {format_bytes(sum(f.size or 0 for f in chosen))}: {folder}")


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
        if all(name.endswith(NOT_FETCHED) for name in found):
            reason = "is a pickle, which can run code" if found else "is not in the repository"
            problems.append(f"{flag} {given}: {reason}; it has {listed(names)}")
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


if __name__ == "__main__":
    main()
