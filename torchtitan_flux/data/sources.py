"""Where items come from: what an item is, and what every source of items offers."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from PIL import Image

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Item:
    """One picture with what can be said about it.

    Attributes:
        image: any mode and size; shared between calls, not to be written to.
        captions: at least one; the first is the canonical one, which validation uses.
        item_id: stable name of the item, unique over all splits of its data set.
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


@runtime_checkable
class Source(Protocol):
    """A fixed, indexed collection of items; index i is the same item in every run."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item:
        """The item at 0 <= index < len; raises UnreadableItem when its data are damaged."""
        ...
