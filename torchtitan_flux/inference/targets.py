"""Where pictures go: names, formats, and what is in the way; all of it known before drawing."""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import features

from torchtitan_flux.image_file import FORMATS
from torchtitan_flux.inference.picture import Picture


def targets(options: argparse.Namespace, folder: Path, pictures: Sequence[Picture]) -> list[Path]:
    """Where each picture goes; in `folder` unless --out names another place.

    A file holds one picture; of several, `x.png` becomes `x-1.png`, `x-2.png`, … Raises ValueError
    for a format that is not written.
    """
    out, suffix = options.out, ".png"
    if out is not None:
        folder = Path(out)
        # a dot may be in the name of a folder as well
        named = "" if out.endswith(os.sep) or os.path.isdir(out) else folder.suffix.lower()
        if named in FORMATS:
            if FORMATS[named] == "WEBP" and not features.check("webp"):
                raise ValueError(f"--out {out}: the installed Pillow has no WebP; use .png")
            names = [f"-{i}" for i in range(1, 1 + len(pictures))] if len(pictures) > 1 else [""]
            return [folder.with_name(f"{folder.stem}{one}{folder.suffix}") for one in names]
        if named[1:2].isalpha():  # .gif, or a slip; v1.5 is no suffix
            raise ValueError(
                f"--out {out}: {named} is none of {', '.join(FORMATS)}; the name of a new folder "
                f"ends with a slash: {out}{os.sep}"
            )
    if options.recorded is not None:
        source = Path(options.from_png)
        # it may have been renamed to anything
        suffix = source.suffix if source.suffix.lower() in FORMATS else suffix
        return [folder / f"{source.stem}-again{suffix}"]
    names = [f"{one.index:04d}-{_slug(one.prompt)}" for one in pictures]
    if options.count > 1:
        names = [f"{name}-{i % options.count + 1}" for i, name in enumerate(names)]
    return [folder / f"{name}.png" for name in names]


def check_paths(paths: Sequence[Path], overwrite: bool) -> None:
    """Raise ValueError where something is in the way, or cannot be written. Leaves nothing."""
    taken = [path for path in paths if os.path.lexists(path)]
    if folders := [path for path in taken if path.is_dir()]:
        raise ValueError(f"{folders[0]} is a folder: name another place with --out")
    if taken and not overwrite:
        more = f", and {len(taken) - 1} more" if len(taken) > 1 else ""
        raise ValueError(
            f"{taken[0]} exists already{more}: --overwrite replaces it, --out names another place"
        )
    longest = {path.parent: path for path in sorted(paths, key=lambda path: len(path.name))}
    for folder, path in longest.items():
        try:
            existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
            with tempfile.NamedTemporaryFile(
                dir=existing, prefix=f".{path.name}", suffix=".partial"
            ):
                pass
        except OSError as error:
            raise unwritable(folder, error) from None


def unwritable(path: Path, error: OSError) -> ValueError:
    """What to say of a file or folder that cannot be written."""
    return ValueError(
        f"{path} cannot be written ({error.strerror or error}): name another place with --out"
    )


def _slug(prompt: str) -> str:
    """A file name's worth of a caption."""
    return "".join(c if c.isalnum() else "-" for c in prompt.lower())[:60].strip("-") or "empty"
