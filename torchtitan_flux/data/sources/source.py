"""Where items come from: what an item is, and what every source of items offers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from PIL import Image

from torchtitan_flux.latents import ImageSize

Split = Literal["train", "held_out"]

# The TOML keys that messages about data name.
PATH_KEY: dict[Split, str] = {
    "train": "training.dataset_path",
    "held_out": "validation.dataset_path",
}
IMAGE_COLUMN, CAPTION_COLUMN = "data.image_column", "data.caption_column"
INDEX_FOLDER, HELD_OUT_SHARE = "data.index_folder", "data.held_out_share"
MAX_PIXELS, CAPTIONS = "data.max_image_pixels", "data.captions"


class SettingError(ValueError):
    """A key other than the path of the data has to be changed."""

    def __init__(self, key: str, message: str):
        super().__init__(f"{key}: {message}")


@dataclass(frozen=True)
class Item:
    """One picture with its captions.

    Attributes:
        image: any mode and size; shared between calls, not to be written to.
        captions: at least one; validation uses the first.
        item_id: unique over all splits of its data set.
    """

    image: Image.Image
    captions: tuple[str, ...]
    item_id: str


class UnreadableItem(Exception):
    """An item exists but cannot be read; the loader goes on with another one."""

    def __init__(self, item_id: str, reason: str):
        super().__init__(item_id, reason)  # both, so that the exception can be pickled
        self.item_id = item_id
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.item_id}: {self.reason}"


@dataclass(frozen=True)
class SourceOptions:
    """Settings of a source, each of which uses some; those not listed are keys of [data].

    Attributes:
        path: folder or file of the data, a pattern, or a hub name.
        image_size: at which a procedural source draws.
        validates_training_data: a held-out part of the data that are trained on is wanted.
        min_size: pixels that the shorter side of a picture must have.
        max_pixels: pictures of more pixels are not decoded.
    """

    path: str | None = None
    image_size: ImageSize = field(default_factory=lambda: ImageSize(64, 64))
    index_folder: Path | None = None
    image_column: str = ""
    caption_column: str = ""
    captions_by_line: bool = False
    default_caption: str | None = None
    caption_prefix: str = ""
    validates_training_data: bool = False
    held_out_share: float = 0.0
    min_size: int = 1
    max_pixels: int = 2**27


@runtime_checkable
class Source(Protocol):
    """A fixed, indexed collection of items; index i is the same item in every run."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item:
        """The item at 0 <= index < len; raises UnreadableItem when its data are damaged."""
        ...


def items_digest(source: Source) -> str:
    """Differs where the ids of a source's items, or their order, do."""
    return getattr(source, "digest", f"{source.name}/{len(source)}")
