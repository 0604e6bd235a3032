"""Whether the configured data sets exist, and are read where something lies."""

from collections.abc import Iterator

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import Problem, violated
from torchtitan_flux.data.sources.registry import DATASETS
from torchtitan_flux.paths import locate, looks_local


def data_key_problems(config: FluxJobConfig) -> Iterator[Problem]:
    """What is wrong with the keys that name data sets and say how they are read."""
    t, v, data = config.training, config.validation, config.data
    other_data = bool(v.dataset_path) or v.dataset not in ("", t.dataset)
    yield from _dataset_problems("training", t.dataset, t.dataset_path, data.caption_prefix)
    if v.enable and other_data:
        name = v.dataset or t.dataset
        yield from _dataset_problems("validation", name, v.dataset_path, data.caption_prefix)
    held_out = other_data or data.held_out_share or t.dataset not in DATASETS
    yield from violated(
        (
            v.enable and not held_out and not DATASETS[t.dataset].has_held_out,
            "validation.enable",
            "nothing is held out: set validation.dataset_path to other data, or "
            "data.held_out_share to the share of the training data to keep back",
            "training.dataset",
            "data.held_out_share",
        ),
        (
            len(data.background) != 3 or not all(0 <= value <= 255 for value in data.background),
            "data.background",
            "must be a list of red, green and blue, 0 to 255",
        ),
    )


def _dataset_problems(section: str, name: str, path: str | None, prefix: str) -> Iterator[Problem]:
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        yield Problem(f"{section}.dataset", f"is not available; use one of {known}")
        return
    dataset, key = DATASETS[name], f"{section}.dataset_path"
    download = f"; download them with `{dataset.download}`" if dataset.download else ""
    missing = path and locate(path) is None and looks_local(path) and not set(path) & set("*?[{")
    yield from violated(
        (dataset.built_in and path is not None, key, f"{name!r} reads no files; remove the key"),
        (
            dataset.needs_path and not path,
            key,
            f"is not set: {name!r} needs the folder of its files{download}",
            f"{section}.dataset",
        ),
        (missing and not dataset.built_in, key, "does not exist"),
        (
            prefix and dataset.built_in,
            "data.caption_prefix",
            f"{section}.dataset = {name!r} makes its own captions; remove the key",
            f"{section}.dataset",
        ),
    )
