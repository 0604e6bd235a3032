"""`load_config(argv)`: TOML and command line -> one checked configuration, or one report."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torchtitan_flux.engine  # noqa: F401  (before torchtitan)

import torch
from torchtitan.config import ConfigManager
from torchtitan.tools.logging import logger

from torchtitan_flux.config.checks import problems
from torchtitan_flux.config.job_config import JobConfig
from torchtitan_flux.config.paths import locate

OURS = ("", "torchtitan.models.flux.job_config", "torchtitan_flux.config.job_config")
"""Values of job.custom_config_module that mean FLUX's own sections."""

TINY = {
    "t5_encoder": "assets/tiny/t5",
    "clip_encoder": "assets/tiny/clip",
    "autoencoder_path": "assets/tiny/ae.safetensors",
}


NOT_DRAWN_BY_VALIDATION = (
    "enable_classifier_free_guidance",
    "classifier_free_guidance_scale",
    "denoising_steps",
    "save_img_count",
    "save_img_folder",
)
"""Keys of torchtitan's [validation] that draw pictures there."""


class ConfigError(ValueError):
    """A configuration that cannot run; the message lists everything that is wrong."""

    def __init__(self, found: list[str]):
        super().__init__("\n".join(f"  - {line}" for line in found))
        self.found = found


class FluxConfigManager(ConfigManager):
    """torchtitan's loader with FLUX's sections always merged in."""

    def __init__(self) -> None:
        super().__init__()
        self.toml: dict[str, Any] = {}

    def _maybe_load_toml(self, args: list[str]) -> dict[str, Any] | None:
        self.toml = super()._maybe_load_toml(args) or {}
        return self.toml

    def _maybe_add_custom_config(self, args: list[str], toml_values: dict[str, Any] | None) -> type:
        merged = self._merge_configs(self.config_cls, JobConfig)
        module = (toml_values or {}).get("job", {}).get("custom_config_module", "")
        if module in OURS:
            return merged
        return self._merge_configs(merged, importlib.import_module(module).JobConfig)

    def is_set(self, key: str, argv: list[str]) -> bool:
        """Whether the file or the command line gives `section.key`."""
        section, name = key.split(".")
        given = (arg.split("=")[0].replace("-", "_") for arg in argv)
        return name in self.toml.get(section, {}) or f"__{key}" in given

    def _validate_config(self) -> None:
        """torchtitan warns of a tokenizer folder that FLUX does not read; `problems` checks."""


def load_config(argv: list[str], training: bool = True) -> Any:
    """The complete configuration of a run.

    Args:
        argv: command line, `--job.config_file FILE` and any `--section.key value`.
        training: whether the run trains, or draws from what was trained.

    Returns:
        torchtitan's JobConfig with FLUX's sections.

    Raises:
        ConfigError: with everything that is wrong.
    """
    argv = found_config_file(argv)
    manager = FluxConfigManager()
    try:
        config: Any = manager.parse_args(argv)
    except (ValueError, OSError) as error:
        raise ConfigError([str(error)]) from error
    if config.training.test_mode:
        logger.warning(f"training.test_mode = true: using the encoders of {TINY['t5_encoder']} …")
        for key, path in TINY.items():
            setattr(config.encoder, key, path)
    unused = sorted(set(manager.toml.get("validation", {})) & set(NOT_DRAWN_BY_VALIDATION))
    if unused:
        logger.warning(f"[validation] {', '.join(unused)}: not used; [sampling] draws pictures")
    if not torch.cuda.is_available():
        if not manager.is_set("training.mixed_precision_param", argv):
            config.training.mixed_precision_param = "float32"
            logger.info(
                "Compute type is float32 on CPU; training.mixed_precision_param sets another one"
            )
        if not manager.is_set("comm.trace_buf_size", argv):
            # It records nccl's collectives for a post-mortem; gloo's fill 100 MB and tell nothing.
            config.comm.trace_buf_size = 0
    if found := problems(config, training):
        raise ConfigError(found)
    return config


def found_config_file(argv: list[str]) -> list[str]:
    """`argv` with the configuration file's path looked up as `locate` does."""
    result = list(argv)
    for i, arg in enumerate(argv):
        key, _, value = arg.partition("=")
        if key.replace("-", "_") != "__job.config_file":
            continue
        at, path = (i, value) if value else (i + 1, argv[i + 1] if i + 1 < len(argv) else "")
        found = locate(path) if path else None
        if found is None:
            raise ConfigError([f"job.config_file = {path!r} does not exist"])
        result[at] = f"{key}={found}" if value else str(found)
    return result


@contextmanager
def exit_on_config_error() -> Iterator[None]:
    """A wrong configuration ends the process: one report, status 2, no traceback."""
    try:
        yield
    except ConfigError as error:
        print(f"The configuration cannot run:\n{error}", file=sys.stderr)
        sys.exit(2)


def load_config_or_exit(argv: list[str], training: bool = True) -> Any:
    """`load_config` for a command line."""
    with exit_on_config_error():
        return load_config(argv, training)
