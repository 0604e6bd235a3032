"""What all sources of files share: an index of their items, and pictures read on demand."""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from torchtitan_flux.data.decode import open_image
from torchtitan_flux.data.sources.captions import NO_CAPTION
from torchtitan_flux.data.sources.index import Index, Row
from torchtitan_flux.data.sources.source import Item, SourceOptions, UnreadableItem


class IndexedSource(ABC):
    """Items of an index.

    `name` is the sort of source, `title` the data, for people. Where `shared`, both splits see all
    items, since none is named for a split.
    """

    shared = True

    def __init__(self, name: str, title: str, index: Index, options: SourceOptions):
        self.name = name
        self.title = title
        self.index = index
        self.options = options

    @abstractmethod
    def read(self, row: Row) -> bytes:
        """The file of a row's picture; raises UnreadableItem or OSError."""

    @property
    def digest(self) -> str:
        return self.index.digest

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Item:
        row = self.index[index]
        captions = self.captions(row)
        if not captions:
            raise UnreadableItem(row.item_id, row.reason or "its caption could not be opened")
        try:
            data = self.read(row)
        except FileNotFoundError as error:
            raise UnreadableItem(row.item_id, "does not exist") from error
        except OSError as error:
            raise UnreadableItem(row.item_id, str(error.strerror)) from error
        image = open_image(data, row.item_id, self.options.max_pixels)
        return Item(image, captions, row.item_id)

    def captions(self, row: Row) -> tuple[str, ...]:
        """The captions that a row is trained with; empty where it has none."""
        captions = row.captions
        if not captions and row.reason == NO_CAPTION and self.options.default_caption is not None:
            captions = (self.options.default_caption,)
        return tuple(self.options.caption_prefix + caption for caption in captions)

    def usable(self, rows: pa.RecordBatch) -> Bool[np.ndarray, " rows"]:
        """Which rows of the index have a caption and, by its header, a picture to train on."""
        captioned = pc.greater(pc.list_value_length(rows["captions"]), 0)
        if self.options.default_caption is not None:
            captioned = pc.or_(captioned, pc.equal(rows["reason"], NO_CAPTION))
        width, height = (rows[name].to_numpy().astype(np.int64) for name in ("width", "height"))
        return (
            captioned.to_numpy(zero_copy_only=False)
            & (width > 0)
            & (np.minimum(width, height) >= self.options.min_size)
            & (width * height <= self.options.max_pixels)
        )

    @cached_property
    def usable_rows(self) -> Bool[np.ndarray, " rows"]:
        """`usable` of the whole index."""
        return np.concatenate([np.zeros(0, bool), *map(self.usable, self.index.batches())])

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "usable_rows"}
