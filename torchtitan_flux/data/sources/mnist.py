"""MNIST, from tables (the hub's layout) or from the four IDX files of its authors."""

import gzip
import math
import re
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8
from PIL import Image

from torchtitan_flux.data.decode import damage_is_unreadable, open_image
from torchtitan_flux.data.sources.columns import Column, image_column, picture_of
from torchtitan_flux.data.sources.digits import DIGIT_WORDS, digit_captions
from torchtitan_flux.data.sources.listing import walk
from torchtitan_flux.data.sources.source import Item, Source, SourceOptions, Split, UnreadableItem
from torchtitan_flux.data.sources.tables import Table, open_table

HUB_NAME = "ylecun/mnist"

_PREFIX = {"train": "train", "held_out": "t10k"}
_BYTES = 0x08  # IDX's code of unsigned bytes, the only type MNIST uses


def mnist_source(split: Split, options: SourceOptions) -> Source:
    """MNIST's training or test images, with the captions that `digits` have.

    Args:
        split: "held_out" is MNIST's own test set.
        options: path to a folder, None for the hub; index_folder, max_pixels.

    Raises:
        ValueError: neither layout is there, or a file is damaged.
    """
    root = Path(options.path).expanduser() if options.path else None
    if root and root.is_dir():
        images, labels = (_find(root, _PREFIX[split], kind) for kind in ("images", "labels"))
        if images and labels:
            return IdxSource(images, labels, split)
    path = options.path or HUB_NAME

    def choose(schema: pa.Schema) -> list[str]:
        if "label" not in schema.names:
            raise ValueError(
                f"training.dataset: MNIST has columns image and label, {path} has "
                f"{', '.join(schema.names)}"
            )
        return [image_column(schema, options.image_column).name, "label"]

    table = open_table(path, split, options, choose, download=HUB_NAME)
    if table.shared and split == "held_out":
        raise ValueError(f"validation.dataset_path: {path} has no test part")
    return MnistTable(table, image_column(table.schema, options.image_column), options.max_pixels)


class IdxSource:
    """Images of two IDX files, plain or gzipped; ids are "mnist/<split>/<row>".

    Plain image files are mapped, gzipped ones are held in memory (47 MB).

    Raises:
        ValueError: a file is damaged, or the two do not fit; names it.
    """

    name = "mnist"

    def __init__(self, images: Path, labels: Path, split: Split):
        self.split = split
        self._images = read_idx(images, 3)
        self._labels = read_idx(labels, 1)
        if len(self._images) != len(self._labels):
            raise ValueError(
                f"{labels}: {len(self._labels)} labels for the {len(self._images)} images of "
                f"{images.name}"
            )
        if len(self._labels) and self._labels.max() >= len(DIGIT_WORDS):
            raise ValueError(f"{labels}: label {self._labels.max()} is not in 0 to 9")

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Item:
        image = Image.fromarray(np.ascontiguousarray(self._images[index]))
        captions = digit_captions(int(self._labels[index]))
        return Item(image, captions, f"mnist/{self.split}/{index}")


class MnistTable:
    """Rows of a picture and a label; ids are "<file or part>/<row>"."""

    name = "mnist"

    def __init__(self, table: Table, image: Column, max_pixels: int):
        self.max_pixels = max_pixels
        self._image = image
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Item:
        name, row = self._table.place(index)
        item_id = f"{name}/{row}"
        with damage_is_unreadable(item_id):
            found = self._table.row(index)
            image = found.column(self._image.name)[0]
            data, path = picture_of(image, self._image.below, item_id)
            label = found.column("label")[0].as_py()
        if not isinstance(label, int) or not 0 <= label < len(DIGIT_WORDS):
            raise UnreadableItem(item_id, f"label {label!r} is not in 0 to 9")
        if data is None:
            raise UnreadableItem(item_id, f"{path}: only its path is there")
        return Item(
            open_image(data.to_pybytes(), item_id, self.max_pixels), digit_captions(label), item_id
        )


def read_idx(file: Path, axes: int) -> UInt8[np.ndarray, "..."]:
    """The array of an IDX file of unsigned bytes: 0, 0, type, axes, each axis, all big-endian.

    Args:
        file: plain, or gzipped with the suffix .gz.
        axes: how many it must have.

    Raises:
        ValueError: damage, by name.
    """
    if file.suffix == ".gz":
        try:
            content = np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file}: damaged gzip file: {error}") from error
    else:
        content = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)
    start = 4 + 4 * axes
    magic = bytes(content[:4])
    if magic != bytes((0, 0, _BYTES, axes)):
        raise ValueError(f"{file}: begins with {magic.hex()}, not as IDX bytes of {axes} axes")
    if len(content) < start:
        raise ValueError(f"{file}: ends within its header")
    shape = tuple(int(n) for n in np.frombuffer(bytes(content[4:start]), ">u4"))
    if len(content) != start + math.prod(shape):
        raise ValueError(f"{file}: {len(content)} bytes do not hold the {shape} that it announces")
    return content[start:].reshape(shape)


def _find(root: Path, prefix: str, kind: str) -> Path | None:
    """The IDX file of images or labels anywhere below a folder, under any of its usual names."""
    wanted = re.compile(rf"{prefix}-{kind}[-.]idx\d-ubyte(\.gz)?")
    found = [root / path for d in walk(root) for path in d.paths()]
    return next((path for path in sorted(found) if wanted.fullmatch(path.name)), None)
