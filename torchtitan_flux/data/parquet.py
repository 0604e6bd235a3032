"""Pictures and captions in the columns of a table: parquet, Arrow, data sets of the hub."""

from pathlib import Path
from typing import Any

from torchtitan_flux.data.captions import CAPTION_NAMES, captions_of
from torchtitan_flux.data.decode import damage_is_unreadable, open_image
from torchtitan_flux.data.files import PATH_KEY, given_path
from torchtitan_flux.data.sources import Item, Source, SourceOptions, Split, UnreadableItem
from torchtitan_flux.data.split import part_of
from torchtitan_flux.data.tables import Table, download_command, open_table

_COCO = "howard-hou/COCO-Text"


class ParquetSource:
    """All rows of a table; ids are "<file or set>/<row>".

    Args:
        table: rows.
        options: image_column, caption_column, max_pixels.
        root: folder that paths in the image column are relative to.

    Raises:
        ValueError: a column is missing or of another type; names the key.
    """

    name = "parquet"

    def __init__(self, table: Table, options: SourceOptions, root: Path):
        self.root = root
        self.max_pixels = options.max_pixels
        self._by_line = options.captions_by_line
        self._image = image_column(table, options.image_column)
        self._caption = _caption_column(table, options.caption_column)
        self._table = encoded(table, self._image, self._caption)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Item:
        item_id = row_id(self._table, index)
        row = read_row(self._table, index, item_id)
        captions = captions_of(row[self._caption], item_id, self._by_line)
        data = image_bytes(row[self._image], item_id, self.root)
        return Item(open_image(data, item_id, self.max_pixels), captions, item_id)


def parquet_source(split: Split, options: SourceOptions) -> Source:
    """One split of the table at `options.path`: its own part, or a share of the rows."""
    path = given_path(options.path, split, "parquet or Arrow files, or a data set of the hub")
    table = open_table(path, split, options)
    if table.shared and options.validates_training_data and not options.held_out_share:
        raise ValueError(
            f"validation.enable = true, and {path} has no validation or test part: set "
            "validation.dataset_path to other data, or data.held_out_share to the share of the "
            "training data to keep back"
        )
    root = Path(path).absolute()
    source = ParquetSource(table, options, root.parent if root.is_file() else root)
    return part_of(source, split, options.held_out_share) if table.shared else source


def coco_source(split: Split, options: SourceOptions) -> Source:
    """torchtitan's "coco-validation": a copy of `howard-hou/COCO-Text`."""
    if not options.path:
        raise ValueError(
            f"{PATH_KEY[split]}: not set; download the data with `{download_command(_COCO)}` "
            "and name the folder"
        )
    return parquet_source(split, options)


def image_column(table: Table, named: str) -> str:
    """The column that holds pictures: the one named, else "image", else the only one.

    Raises:
        ValueError: there is none, or more than one.
    """
    features = table.features
    if named:
        if named not in features:
            raise ValueError(f"data.image_column: there is no column {named!r}; {_listed(table)}")
        if not _holds_pictures(features[named]):
            raise ValueError(
                f"data.image_column: column {named!r} holds no encoded images; {_listed(table)}"
            )
        return named
    found = [name for name, feature in features.items() if _is_image(feature)]
    found = found or [name for name, feature in features.items() if _holds_pictures(feature)]
    if "image" in found:
        return "image"
    if len(found) != 1:
        which = f"one of {', '.join(found)} has to be named" if found else "no column holds images"
        raise ValueError(f"data.image_column: {which}; {_listed(table)}")
    return found[0]


def encoded(table: Table, image: str, other: str) -> Table:
    """Two columns of a table, pictures as the bytes of their files."""
    from datasets import Image

    if _is_image(table.features[image]):
        table = table.mapped(lambda part: part.cast_column(image, Image(decode=False)))
    return table.mapped(lambda part: part.select_columns([image, other]))


def row_id(table: Table, index: int) -> str:
    """Stable name of a row."""
    name, row = table.place(index)
    return f"{name}/{row}"


def read_row(table: Table, index: int, item_id: str) -> dict[str, Any]:
    """Values of a row; UnreadableItem where the file behind it is damaged."""
    with damage_is_unreadable(item_id):
        return table.row(index)


def image_bytes(value: object, item_id: str, root: Path) -> bytes:
    """The file of a picture, from a column of bytes or of {bytes, path}."""
    path = None
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(path, str):
        try:
            return (root / path).read_bytes()
        except OSError as error:
            raise UnreadableItem(item_id, f"{path}: {error.strerror}") from error
    raise UnreadableItem(item_id, "has no image")


def _caption_column(table: Table, named: str) -> str:
    features = table.features
    if named and named not in features:
        raise ValueError(f"data.caption_column: there is no column {named!r}; {_listed(table)}")
    column = named or next((name for name in CAPTION_NAMES if name in features), "")
    if not column:
        raise ValueError(
            f"data.caption_column: no column is called {', '.join(CAPTION_NAMES)}; {_listed(table)}"
        )
    if not _is_text(features[column]):
        raise ValueError(f"data.caption_column: column {column!r} holds no text; {_listed(table)}")
    return column


def _is_image(feature: Any) -> bool:
    from datasets import Image

    return isinstance(feature, Image)


def _holds_pictures(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and _holds_pictures(feature["bytes"])
    return _is_image(feature) or getattr(feature, "dtype", "") in ("binary", "large_binary")


def _is_text(feature: Any) -> bool:
    inner = getattr(feature, "feature", None)  # of lists
    if isinstance(feature, list):
        inner = feature[0]
    if inner is not None:
        return _is_text(inner)
    return getattr(feature, "dtype", "") in ("string", "large_string")


def _listed(table: Table) -> str:
    return f"the columns are {', '.join(table.features)}"
