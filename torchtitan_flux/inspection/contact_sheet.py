"""Pictures as they will be trained on, with their captions below them, on one page."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from torchtitan_flux.sampling.generate import to_pil

COLUMNS = 6
_CELL = 192
"""Pixels of a cell's width; larger pictures are shrunk to it, small ones enlarged by a whole number
without smoothing."""
_LINES, _LINE_HEIGHT, _GAP, _FONT_SIZE = 4, 13, 8, 11


def save_contact_sheet(pictures: Sequence[tuple[torch.Tensor, str]], path: Path) -> None:
    """Write a PNG of (image [channels, H, W] in [-1, 1], caption) pairs, row by row.

    Raises:
        OSError: it cannot be written.
    """
    images = [_scaled(to_pil(image)) for image, _ in pictures]
    height = max(image.height for image in images) + _LINES * _LINE_HEIGHT + _GAP
    rows = -(-len(images) // COLUMNS)
    columns = min(COLUMNS, len(images))
    page = Image.new(
        "RGB", (columns * (_CELL + _GAP) + _GAP, rows * (height + _GAP) + _GAP), "white"
    )
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(_FONT_SIZE)
    for number, (image, (_, caption)) in enumerate(zip(images, pictures, strict=True)):
        row, column = divmod(number, COLUMNS)
        left, top = _GAP + column * (_CELL + _GAP), _GAP + row * (height + _GAP)
        page.paste(image, (left, top))
        text = textwrap.wrap(caption, 34, max_lines=_LINES, placeholder=" …") or ["(no caption)"]
        pen.text((left, top + image.height + 2), "\n".join(text), "black", font, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, format="PNG")


def _scaled(image: Image.Image) -> Image.Image:
    width, height = image.size
    longer = max(width, height)
    if longer > _CELL:
        image.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
        return image
    factor = _CELL // longer
    return image.resize((width * factor, height * factor), Image.Resampling.NEAREST)
