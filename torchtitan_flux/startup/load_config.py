"""`load_config(argv)`: TOML and command line -> one checked configuration, or one report."""

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torchtitan.tools.logging import logger

from torchtitan_flux.config.command_line import given_keys, parse
from torchtitan_flux.config.job_config import Encoder, FluxJobConfig, Inference
from torchtitan_flux.config.meanings import NOT_USED
from torchtitan_flux.config.problems import ConfigError, Problem, exit_on_config_error
from torchtitan_flux.config.schema import get, keys_of, put, unknown_name
from torchtitan_flux.config.toml_file import TomlFile, read_toml
from torchtitan_flux.config.values import from_toml, shown
from torchtitan_flux.paths import locate
from torchtitan_flux.startup.checks import problems

CONFIG_FILE = "job.config_file"
KEYS = {key.name: key for key in keys_of(FluxJobConfig)}

TORCHTITAN_PROMPTS = "torchtitan/models/flux/inference/prompts.txt"
"""What torchtitan's files call the prompts, which only a checkout has there."""


@dataclass
class Reading:
    """A file and a command line, read but not yet checked as a whole.

    Attributes:
        config: with the default where a key is not set, or not set to anything sensible.
        problems: what is wrong.
        unknown: keys whose value is not known because something is wrong with it.
        given: keys that are set -> where: "FILE:LINE", or "" for the command line.
    """

    config: FluxJobConfig = field(default_factory=FluxJobConfig)
    problems: list[Problem] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    given: dict[str, str] = field(default_factory=dict)


def load_config(
    argv: list[str],
    training: bool = True,
    more: Callable[[FluxJobConfig], Iterable[Problem]] | None = None,
    ranks: int | None = None,
) -> FluxJobConfig:
    """The complete configuration of a run.

    Args:
        argv: command line, `--job.config_file FILE` and any `--section.key value`.
        training: whether the run trains, or draws from what was trained.
        more: finds what else is wrong with a configuration, for the same report.
        ranks: of the run; None takes what torchrun says, 1 without it.

    Raises:
        ConfigError: with everything that is wrong.
    """
    reading = read(argv)
    notes = list(_adapt(reading))
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if ranks is None else ranks
    wrong = [*problems(reading.config, training, ranks)]
    wrong += more(reading.config) if more else []
    found = [*reading.problems, *located(wrong, reading.config, reading.given, reading.unknown)]
    if found:
        raise ConfigError(found)
    for level, note in notes:
        logger.log(level, note)
    return reading.config


def load_config_or_exit(argv: list[str], training: bool = True) -> FluxJobConfig:
    """`load_config` for a command line."""
    with exit_on_config_error():
        return load_config(argv, training)


def read_config(argv: list[str]) -> FluxJobConfig:
    """The configuration as on another machine: types are checked, files need not be here.

    Raises:
        ConfigError: with everything that cannot be read.
    """
    reading = read(argv)
    if reading.problems:
        raise ConfigError(reading.problems)
    return reading.config


def read(argv: list[str]) -> Reading:
    """What a file and a command line say.

    Raises:
        ConfigError: the file cannot be read.
    """
    named = [text for key, text in given_keys(argv) if key == CONFIG_FILE]
    file = read_toml(locate(named[-1]) or Path(named[-1])) if named else TomlFile("")
    reading = Reading()
    _read_table(file, file.values, "", reading)
    values, wrong, in_doubt = parse(argv, KEYS)
    for key, value in values.items():
        put(reading.config, key, value)
        reading.given[key] = ""
    reading.problems += wrong
    reading.unknown = (reading.unknown - set(values)) | in_doubt
    job = reading.config.job
    job.config_file = file.path or job.config_file
    # once, for everything that writes there; elsewhere "~" would be a folder of that name
    job.dump_folder = os.path.expanduser(job.dump_folder)
    return reading


def _read_table(file: TomlFile, table: dict[str, Any], prefix: str, reading: Reading) -> None:
    """Put what a table of the file says into the configuration, or note what is wrong with it."""
    for last, value in table.items():
        name = prefix + last
        where = f"{file.where(name)}: {name}"
        within = [key for key in KEYS if key.startswith(f"{name}.")]
        meant: list[str] = []
        if within and isinstance(value, dict):
            _read_table(file, value, f"{name}.", reading)
            continue
        if within:
            problem = Problem(name, f"is a section: write [{name}], and its keys below", (), where)
            meant = within
        elif name == CONFIG_FILE:
            problem = Problem(name, "belongs on the command line; remove it", (), where)
        elif key := KEYS.get(name):
            try:
                put(reading.config, name, from_toml(value, key.annotation))
                reading.given[name] = file.where(name)
                continue
            except ValueError as error:
                problem = Problem(name, str(error), (), f"{where} = {shown(value)}")
                meant = [name]
        else:
            problem, meant = unknown_name(name, KEYS, where, isinstance(value, dict))
        reading.problems.append(problem)
        reading.unknown.update(meant)


def _adapt(reading: Reading) -> Iterator[tuple[int, str]]:
    """Set what depends on the machine, and what torchtitan's files mean here; yields log lines."""
    config, given = reading.config, reading.given
    if config.training.test_mode:
        yield (
            logging.WARNING,
            "training.test_mode = true: the encoders of assets/tiny are used, whatever [encoder] "
            "names",
        )
        for key in ("t5_encoder", "clip_encoder", "autoencoder_path"):
            setattr(config.encoder, key, getattr(Encoder, key))
    prompts = config.inference.prompts_path
    if prompts.removeprefix("./") == TORCHTITAN_PROMPTS and locate(prompts) is None:
        config.inference.prompts_path = Inference.prompts_path
    yield from ((logging.WARNING, line) for line in _not_used(reading))
    if not torch.cuda.is_available():
        if "training.mixed_precision_param" not in given:
            config.training.mixed_precision_param = "float32"
            yield (
                logging.INFO,
                "Compute type is float32 on CPU; training.mixed_precision_param sets another one",
            )
        if "comm.trace_buf_size" not in given:
            # It records nccl's collectives for a post-mortem; gloo's fill 100 MB and tell nothing.
            config.comm.trace_buf_size = 0


def _not_used(reading: Reading) -> Iterator[str]:
    """A line for each reason why keys do nothing of which one is set otherwise than by default."""
    defaults = FluxJobConfig()
    reasons: dict[str, list[str]] = {}
    for key in filter(NOT_USED.__contains__, reading.given):
        reasons.setdefault(NOT_USED[key], []).append(key)
    for reason, keys in reasons.items():
        if any(get(reading.config, key) != get(defaults, key) for key in keys):
            yield f"{', '.join(keys)}: not used; {reason}"


def located(
    found: Iterable[Problem],
    config: FluxJobConfig,
    given: Mapping[str, str] = MappingProxyType({}),
    unknown: Collection[str] = (),
) -> Iterator[Problem]:
    """Problems with the value of their key and where it is given, as in `Reading`.

    Without those that rest on a default which stands in for a value that is not known.
    """
    for problem in found:
        if problem.given or not problem.key:
            yield problem
        elif not {problem.key, *problem.related}.intersection(unknown):
            where = next((given[k] for k in (problem.key, *problem.related) if k in given), "")
            text = f"{where}: {problem.key}" if where else problem.key
            try:
                value = get(config, problem.key)
            except AttributeError:  # not a key: several, or a section
                value = None
            known = value is not None and not is_dataclass(value)
            yield replace(problem, given=f"{text} = {shown(value)}" if known else text)
