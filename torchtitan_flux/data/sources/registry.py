"""The data sets that a configuration can name."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from torchtitan_flux.data.sources.digits import DigitsSource
from torchtitan_flux.data.sources.image_folder import FolderSource
from torchtitan_flux.data.sources.shapes import ShapesSource
from torchtitan_flux.data.sources.source import (
    PATH_KEY,
    SettingError,
    Source,
    SourceOptions,
    Split,
)
from torchtitan_flux.data.sources.split import part_or_share
from torchtitan_flux.data.sources.webdataset import TarSource
from torchtitan_flux.paths import resolved_path


@dataclass(frozen=True)
class Dataset:
    """One value of `training.dataset`.

    Attributes:
        open: makes the source of a split.
        built_in: made by the program, captions included; there are no files.
        path, caption_column, caption_prefix: where the configuration names none.
        download: command that fetches it.
        has_held_out: may have a held-out part of its own, which is known when it is opened.
    """

    open: Callable[[Split, SourceOptions], Source]
    built_in: bool = False
    path: str = ""
    download: str = ""
    has_held_out: bool = True
    caption_column: str = ""
    caption_prefix: str = ""

    @property
    def needs_path(self) -> bool:
        return not (self.built_in or self.path)


def _tables(split: Split, options: SourceOptions) -> Source:
    from torchtitan_flux.data.sources.parquet import ParquetSource  # takes two seconds

    return ParquetSource(split, options)


DATASETS = {
    "digits": Dataset(lambda split, _: DigitsSource(split), built_in=True),
    "shapes": Dataset(lambda split, o: ShapesSource(split, o.image_size), built_in=True),
    "folder": Dataset(FolderSource),
    "webdataset": Dataset(TarSource),
    "parquet": Dataset(_tables),
    "mnist": Dataset(
        _tables,
        path="ylecun/mnist",
        caption_column="label",
        caption_prefix="a handwritten digit ",
    ),
    # Names of torchtitan's own FLUX files:
    "cc12m-wds": Dataset(
        TarSource,
        download="hf download pixparse/cc12m-wds --repo-type dataset --include '*.tar' "
        "--local-dir cc12m-wds",
    ),
    "cc12m-test": Dataset(TarSource, path="tests/assets/cc12m_test", has_held_out=False),
    "coco-validation": Dataset(
        _tables,
        download="hf download howard-hou/COCO-Text --repo-type dataset --local-dir COCO-Text",
    ),
}


def build_source(name: str, split: Split, options: SourceOptions | None = None) -> Source:
    """The source that the configuration names; what two splits read never shares an item.

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
        return part_or_share(dataset.open(split, options), split, options)
    except SettingError:
        raise
    except OSError as error:
        what = error.filename or path
        raise ValueError(f"{key}: {what} cannot be opened: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
