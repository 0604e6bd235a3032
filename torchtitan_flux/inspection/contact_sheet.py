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
    """Write a PNG of (image [channels, H, W] in [-1, 1], caption) pairs; OSError if it cannot."""
    images = [_scaled(to_pil(image)) for image, _ in pictures]
    width = _CELL + _GAP
    height = max(image.height for image in images) + _LINES * _LINE_HEIGHT + 2 * _GAP
    rows, columns = -(-len(images) // COLUMNS), min(COLUMNS, len(images))
    page = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(_FONT_SIZE)
    for number, (image, (_, caption)) in enumerate(zip(images, pictures, strict=True)):
        row, column = divmod(number, COLUMNS)
        left, top = _GAP + column * width, _GAP + row * height
        page.paste(image, (left, top))
        text = textwrap.wrap(caption, 34, max_lines=_LINES, placeholder=" …") or ["(no caption)"]
        pen.text((left, top + image.height + 2), "\n".join(text), "black", font, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, format="PNG")


def _scaled(image: Image.Image) -> Image.Image:
    factor = _CELL // max(image.size)
    if factor:
        size = (image.width * factor, image.height * factor)
        return image.resize(size, Image.Resampling.NEAREST)
    image.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
    return image
