"""The data sets that a configuration can name."""

import os
from dataclasses import dataclass, replace
from typing import Literal

from torchtitan_flux.data.sources.source import (
    PATH_KEY,
    SettingError,
    Source,
    SourceOptions,
    Split,
)
from torchtitan_flux.paths import resolved_path


@dataclass(frozen=True)
class Dataset:
    """One value of `training.dataset`.

    Attributes:
        kind: what reads it.
        path: read where the configuration names none.
        download: command that fetches it.
        has_held_out: may have a held-out part of its own, which is known when it is opened.
        caption_column, caption_prefix: of the data set, where the configuration says nothing.
    """

    kind: Literal["digits", "shapes", "folder", "webdataset", "parquet"]
    path: str = ""
    download: str = ""
    has_held_out: bool = True
    caption_column: str = ""
    caption_prefix: str = ""

    @property
    def built_in(self) -> bool:
        """Made by the program, captions included: there are no files."""
        return self.kind in ("digits", "shapes")

    @property
    def needs_path(self) -> bool:
        return not (self.built_in or self.path)


DATASETS = {
    "digits": Dataset("digits"),
    "shapes": Dataset("shapes"),
    "folder": Dataset("folder"),
    "webdataset": Dataset("webdataset"),
    "parquet": Dataset("parquet"),
    "mnist": Dataset(
        "parquet",
        path="ylecun/mnist",
        caption_column="label",
        caption_prefix="a handwritten digit ",
    ),
    # Names of torchtitan's own FLUX files:
    "cc12m-wds": Dataset(
        "webdataset",
        download="hf download pixparse/cc12m-wds --repo-type dataset --include '*.tar' "
        "--local-dir cc12m-wds",
    ),
    "cc12m-test": Dataset("webdataset", path="tests/assets/cc12m_test", has_held_out=False),
    "coco-validation": Dataset(
        "parquet",
        download="hf download howard-hou/COCO-Text --repo-type dataset --local-dir COCO-Text",
    ),
}


def build_source(name: str, split: Split, options: SourceOptions | None = None) -> Source:
    """Build the source that the configuration names.

    Args:
        name: a key of `DATASETS`.
        split: "train" or "held_out"; the two never share an item.
        options: where the data lie and how they are read.

    Raises:
        ValueError: unknown name, or data that are not there or cannot be read; names the key.
    """
    key = PATH_KEY[split]
    if name not in DATASETS:
        known = ", ".join(sorted(DATASETS))
        raise ValueError(f"{key.removesuffix('_path')}: unknown data set {name!r}; known: {known}")
    dataset, options = DATASETS[name], options or SourceOptions()
    path = options.path or dataset.path
    if not (path or dataset.built_in):
        how = f"; download the data with `{dataset.download}`" if dataset.download else ""
        raise ValueError(f"{key}: not set; name the data{how}")
    options = replace(
        options,
        path=os.path.expanduser(resolved_path(path)),
        index_folder=options.index_folder and options.index_folder.expanduser().absolute(),
        caption_column=options.caption_column or dataset.caption_column,
        caption_prefix=options.caption_prefix or dataset.caption_prefix,
    )
    try:
        source = _open(dataset.kind, split, options)
    except SettingError:
        raise
    except OSError as error:
        what = error.filename or path
        raise ValueError(f"{key}: {what} cannot be opened: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    from torchtitan_flux.data.sources.split import part_or_share

    return part_or_share(source, split, options)


def _open(kind: str, split: Split, options: SourceOptions) -> Source:
    """Imports what it needs only: scikit-learn takes a second, `datasets` two."""
    match kind:
        case "digits":
            from torchtitan_flux.data.sources.digits import DigitsSource

            return DigitsSource(split)
        case "shapes":
            from torchtitan_flux.data.sources.shapes import ShapesSource

            return ShapesSource(split, options.image_size)
        case "folder":
            from torchtitan_flux.data.sources.image_folder import FolderSource

            return FolderSource(split, options)
        case "webdataset":
            from torchtitan_flux.data.sources.webdataset import TarSource

            return TarSource(split, options)
        case _:
            from torchtitan_flux.data.sources.parquet import ParquetSource

            return ParquetSource(split, options)
