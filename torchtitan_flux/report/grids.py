"""Grids of pictures that a run drew -> images that fit into a page."""

import base64
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

MAX_GRIDS = 40
MAX_BYTES = 400_000
"""A grid's file goes into the page as it is up to this size; larger ones are made smaller."""
MAX_SIDE = 1600


@dataclass(frozen=True)
class Grid:
    """One grid.

    Attributes:
        step: when it was drawn.
        prompts: one for each row; empty where the file does not say.
        facts: what else its metadata say.
        width, height: pixels of the file.
        data: a data URI.
        reduced: whether the page holds less than the file.
    """

    step: int
    prompts: tuple[str, ...]
    facts: dict[str, str]
    width: int
    height: int
    data: str
    reduced: bool


def list_grids(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of every grid in a folder, by step."""
    names = ((re.fullmatch(r"step-(\d+)\.png", p.name), p) for p in folder.glob("step-*.png"))
    return sorted((int(match[1]), path) for match, path in names if match)


def spread(items: list, count: int) -> list:
    """At most `count` items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def read_grid(step: int, path: Path) -> Grid:
    """A grid's file.

    Args:
        step: from its name.
        path: a PNG.

    Raises:
        OSError: it cannot be read as a picture.
    """
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
            facts = {name: str(text) for name, text in getattr(image, "text", {}).items()}
            width, height = image.size
            reduced = len(content) > MAX_BYTES
            if reduced:
                content = _smaller(image)
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from error
    prompts = _prompts(facts.pop("prompts", ""))
    facts.pop("step", None)
    kind = "jpeg" if reduced else "png"
    data = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Grid(step, prompts, facts, width, height, data, reduced)


def _prompts(text: str) -> tuple[str, ...]:
    """Of the list that the trainer writes; none where another program wrote something else."""
    try:
        found = json.loads(text)
    except ValueError:
        return ()
    return tuple(map(str, found)) if isinstance(found, list) else ()


def _smaller(image: Image.Image) -> bytes:
    copy = image.convert("L" if image.mode in ("1", "L") else "RGB")
    copy.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    copy.save(out, format="JPEG", quality=88)
    return out.getvalue()
