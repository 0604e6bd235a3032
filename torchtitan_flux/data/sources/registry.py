"""The sources that a configuration can name."""

from collections.abc import Callable
from dataclasses import replace

from torchtitan_flux.data.sources.source import Source, SourceOptions, Split

NAMING_KEY: dict[Split, str] = {"train": "training.dataset", "held_out": "validation.dataset"}
"""The TOML key that names the source of each split."""


DOWNLOADS = {
    "cc12m-wds": "hf download pixparse/cc12m-wds --repo-type dataset --include '*.tar' "
    "--local-dir cc12m-wds",
    "coco-validation": "hf download howard-hou/COCO-Text --repo-type dataset --local-dir COCO-Text",
}
"""How to get data sets that torchtitan's FLUX files name."""


def _digits(split: Split, options: SourceOptions) -> Source:
    from torchtitan_flux.data.sources.digits import DigitsSource

    return DigitsSource(split)


def _shapes(split: Split, options: SourceOptions) -> Source:
    from torchtitan_flux.data.sources.shapes import ShapesSource

    return ShapesSource(split, options.image_size)


def _folder(split: Split, options: SourceOptions) -> Source:
    from torchtitan_flux.data.sources.image_folder import folder_source

    return folder_source(split, options)


def _webdataset(split: Split, options: SourceOptions, name: str = "webdataset") -> Source:
    from torchtitan_flux.data.sources.webdataset import webdataset_source

    return webdataset_source(name, split, options)


def _cc12m(split: Split, options: SourceOptions) -> Source:
    if not options.path:
        raise ValueError(
            f"{NAMING_KEY[split]}_path: not set; name the folder of the downloaded shards: "
            f"`{DOWNLOADS['cc12m-wds']}`"
        )
    return _webdataset(split, options, "cc12m-wds")


def _cc12m_test(split: Split, options: SourceOptions) -> Source:
    from torchtitan_flux.data.sources.webdataset import cc12m_test_folder

    path = options.path or cc12m_test_folder(split)
    return _webdataset(split, replace(options, path=path), "cc12m-test")


def _parquet(split: Split, options: SourceOptions) -> Source:
    from torchtitan_flux.data.sources.parquet import parquet_source

    return parquet_source(split, options)


def _coco(split: Split, options: SourceOptions) -> Source:
    from torchtitan_flux.data.sources.parquet import coco_source

    return coco_source(split, options)


def _mnist(split: Split, options: SourceOptions) -> Source:
    from torchtitan_flux.data.sources.mnist import mnist_source

    return mnist_source(split, options)


# Builders import when called: sklearn takes a second to load, and a run reads one or two sources.
SOURCES: dict[str, Callable[[Split, SourceOptions], Source]] = {
    "digits": _digits,
    "shapes": _shapes,
    "folder": _folder,
    "webdataset": _webdataset,
    "cc12m-wds": _cc12m,
    "cc12m-test": _cc12m_test,
    "parquet": _parquet,
    "coco-validation": _coco,
    "mnist": _mnist,
}


BUILT_IN = ("digits", "shapes")
"""Sources that read no files."""

OWN_CAPTIONS = (*BUILT_IN, "mnist")
"""Sources that make their captions themselves."""

NEED_PATH = ("folder", "webdataset", "parquet", "cc12m-wds", "coco-validation")
"""Sources that read nothing unless they are told where."""

WITHOUT_HELD_OUT = ("cc12m-test",)
"""Sources whose only held-out part is the one that `data.held_out_share` takes from them.

Whether others have one is known when they are opened."""


def build_source(name: str, split: Split, options: SourceOptions | None = None) -> Source:
    """Build the source that the configuration names.

    Args:
        name: a key of `SOURCES`.
        split: "train" or "held_out"; the two never share an item.
        options: where the data lie and how they are read.

    Raises:
        ValueError: unknown name, or data that are not there or cannot be read.
    """
    known = ", ".join(sorted(SOURCES))
    if name not in SOURCES:
        raise ValueError(f"{NAMING_KEY[split]}: unknown data set {name!r}; known: {known}")
    return SOURCES[name](split, options or SourceOptions())
