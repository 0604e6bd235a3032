"""Command line of scripts/download_hf_assets.py and of `python -m torchtitan_flux.downloads`."""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torchtitan_flux.downloads.choose import KINDS, DownloadError, RemoteFile, choose
from torchtitan_flux.downloads.fetch import fetch, is_right, part_path
from torchtitan_flux.downloads.hub import Hub
from torchtitan_flux.files import try_lock
from torchtitan_flux.paths import PACKAGE, locate

EPILOG = f"""\
--assets takes folders of the repository (transformer, text_encoder, tokenizer_2, ...) or, where it
has no such folder, kinds of files: {", ".join(KINDS)}.
Pickled weights (.bin, .pt, ...) are never fetched.

Exit status: 0 all files are there and right; 2 nothing was fetched, the message says why;
1 stopped in the middle, the same command continues.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, download, and end with an exit status; one message where it cannot be done."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if not (options.assets or options.additional_patterns or options.all):
        parser.error("say what to fetch: --assets, --additional_patterns or --all")
    try:
        hub = Hub(options.repo_id, options.revision, options.hf_token)
        download(hub, options)
    except DownloadError as error:
        print(error, file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        sys.exit(1)


def build_parser() -> argparse.ArgumentParser:
    """The flags; torchtitan's own script has the same names."""
    parser = argparse.ArgumentParser(
        prog="download_hf_assets.py",
        description="Fetch files of a Hugging Face repository, verified, continuing what was cut.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repo_id", required=True, help="such as black-forest-labs/FLUX.1-dev")
    parser.add_argument("--assets", nargs="+", default=[], help="folders, or kinds of files")
    parser.add_argument(
        "--additional_patterns",
        nargs="+",
        default=[],
        help="files, such as ae.safetensors '*.json'",
    )
    parser.add_argument("--all", action="store_true", help="every file of the repository")
    parser.add_argument(
        "--local_dir", type=Path, help="the files go to a folder of it named after the repository "
        "(assets/hf, where the configurations look)",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit (main)")
    parser.add_argument("--hf_token", help="default: HF_TOKEN, then the stored login")
    parser.add_argument(
        "--dry_run", action="store_true", help="list files and sizes, fetch nothing"
    )
    return parser


def default_folder() -> Path:
    """assets/hf: the one that configurations would read, else in the checkout, else here."""
    if found := locate("assets/hf"):
        return found
    checkout = PACKAGE.parent
    return (checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / "assets" / "hf"


def download(hub: Hub, options: argparse.Namespace) -> None:
    """Say what will be fetched and how much it is, check the space for it, fetch it.

    Raises:
        DownloadError: of status 2 before anything was fetched, of status 1 afterwards.
    """
    parent = default_folder() if options.local_dir is None else options.local_dir.expanduser()
    folder = (parent / hub.repo_id.split("/")[-1]).absolute()
    choice = choose(hub.files(), options.assets, options.additional_patterns, options.all)
    print(f"{hub.repo_id} at {hub.commit[:12]}, to {folder}")
    for file in choice.left_out:
        print(f"{size_text(file.size):>10}  {file.name}: left out, a pickle")
    with _alone(folder, dry_run=options.dry_run):
        missing = _survey(choice.files, folder)
        if missing:
            hub.check_access(missing[0])
        need = sum(file.size - _waiting(file, folder) for file in missing)
        free = free_space(folder)
        print(
            f"to fetch: {_count(missing)}, {size_text(need)}; free: {size_text(free)}", flush=True
        )
        if need > free:
            raise DownloadError(
                f"not enough space in {folder}: {size_text(need)} needed, {size_text(free)} free; "
                "make room, or name another disk with --local_dir"
            )
        if options.dry_run:
            return
        for file in missing:
            fetch(hub, file, folder / file.name)
    whole = size_text(sum(file.size for file in choice.files))
    print(f"{_count(choice.files)}, {whole}, checksums right: {folder}")


def free_space(folder: Path) -> int:
    """Bytes free where `folder` is or will be.

    Raises:
        DownloadError: it cannot be written there.
    """
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise DownloadError(f"{there} is no folder that can be written to: change --local_dir")
    return shutil.disk_usage(there).free


def size_text(size: int) -> str:
    """Bytes as the hub's pages show them: powers of 1000, three digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} B"


def _count(files: Sequence[RemoteFile]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files)} files"


def _survey(files: Sequence[RemoteFile], folder: Path) -> list[RemoteFile]:
    """Print each file with its size and state; returns those to fetch."""
    missing = []
    for file in files:
        path = folder / file.name
        state = ""
        if is_right(path, file):
            state = "  is here"
        else:
            missing.append(file)
            if waiting := _waiting(file, folder):
                state = f"  {size_text(waiting)} of it are here"
            elif path.exists():
                state = "  differs from the one here, which it replaces"
        print(f"{size_text(file.size):>10}  {file.name}{state}", flush=True)
    return missing


def _waiting(file: RemoteFile, folder: Path) -> int:
    """Bytes of a file that an earlier run has fetched."""
    part = part_path(folder / file.name, file)
    return min(part.stat().st_size, file.size) if part.is_file() else 0


@contextmanager
def _alone(folder: Path, dry_run: bool) -> Iterator[None]:
    """Keep a second download out of the folder; a dry run writes nothing and needs nothing.

    Raises:
        DownloadError: another one is at work, or the folder cannot be made.
    """
    if dry_run:
        yield
        return
    free_space(folder)  # says what is wrong with the folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".download.lock"
    try:
        lock = path.open("w")
    except OSError as error:
        raise DownloadError(f"{path} cannot be written: {error.strerror}") from None
    with lock:
        if try_lock(lock.fileno()) is False:
            raise DownloadError(f"another download is writing to {folder}: wait for it")
        yield
