"""`load_config(argv)`: TOML and command line -> one checked configuration, or one report."""

import importlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torchtitan.tools.logging import logger

from torchtitan_flux.config.command_line import given_keys, parse
from torchtitan_flux.config.errors import ConfigError, exit_on_config_error
from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.meanings import NOT_USED
from torchtitan_flux.config.schema import Key, get, keys_of, merged, put, sections_of
from torchtitan_flux.config.toml_file import TomlFile, read_toml
from torchtitan_flux.config.unknown_keys import unknown_key, unknown_section
from torchtitan_flux.config.values import Unfit, allowed, from_toml, shown, what_it_is
from torchtitan_flux.paths import locate
from torchtitan_flux.startup.checks import problems

CONFIG_FILE = "job.config_file"
CUSTOM_MODULE = "job.custom_config_module"

OURS = (
    "",
    "torchtitan.models.flux.job_config",
    "torchtitan.experiments.flux.job_config",
    "torchtitan_flux.config.job_config",
)
"""Values of job.custom_config_module that mean FLUX's own sections."""

TINY = {
    "t5_encoder": "assets/tiny/t5",
    "clip_encoder": "assets/tiny/clip",
    "autoencoder_path": "assets/tiny/ae.safetensors",
}

THEIR_PROMPTS = "torchtitan/models/flux/inference/prompts.txt"
OUR_PROMPTS = "assets/prompts.txt"
"""What torchtitan's files call the prompts, which only a checkout has there."""


@dataclass(frozen=True)
class Reading:
    """A file and a command line, read but not yet checked as a whole.

    Attributes:
        config: with the default where a key is not set, or not set to anything sensible.
        found: what is wrong, a line each.
        doubtful: keys whose value is not known because something is wrong with it.
        given: keys that are set -> where: "FILE:LINE", or "" for the command line.
        notes: (level, line) for the log.
        complete: whether all keys were read; a file that is no TOML says nothing about any.
    """

    config: FluxJobConfig
    found: list[str]
    doubtful: frozenset[str]
    given: dict[str, str]
    notes: list[tuple[int, str]]
    complete: bool


def load_config(
    argv: list[str],
    training: bool = True,
    more: Callable[[FluxJobConfig], list[str]] | None = None,
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
    notes = [*reading.notes, *_settle(reading)]
    found = list(reading.found)
    if reading.complete:
        ranks = int(os.environ.get("WORLD_SIZE", "1")) if ranks is None else ranks
        lines = problems(reading.config, training, ranks)
        lines += more(reading.config) if more else []
        found += _without_doubtful(lines, reading)
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
    if reading.found:
        raise ConfigError(reading.found)
    return reading.config


def read(argv: list[str]) -> Reading:
    """Everything that a file and a command line say; raises nothing."""
    found: list[str] = []
    file, complete = TomlFile(""), True
    try:
        file = _file(argv)
    except ValueError as error:
        found.append(str(error))
        complete = False
    cls: type = FluxJobConfig
    try:
        cls = _with_custom_sections(argv, file)
    except ValueError as error:  # then nobody knows which keys there are
        return Reading(cls(), [*found, str(error)], frozenset(), {}, [], complete=False)
    keys = {key.name: key for key in keys_of(cls)}
    config, given, doubtful = cls(), {}, set()
    for key, value, problem, meant in _from_file(file, keys, list(sections_of(cls))):
        if problem:
            found.append(problem)
            doubtful.update(meant)
        else:
            put(config, key, value)
            given[key] = file.where(key)
    line = parse(argv, keys)
    for key, override in line.overrides.items():
        put(config, key, override.value)
        given[key] = ""
    doubtful = (doubtful - set(line.overrides)) | line.doubtful
    if file.path:
        config.job.config_file = file.path
    # once, for everything that writes there; elsewhere "~" would be a folder of that name
    config.job.dump_folder = os.path.expanduser(config.job.dump_folder)
    notes = [(logging.WARNING, repeated) for repeated in line.repeated]
    return Reading(config, found + line.found, frozenset(doubtful), given, notes, complete)


def _file(argv: list[str]) -> TomlFile:
    """The configuration file of a command line; an empty one where none is named.

    Raises:
        ValueError: it is not there, cannot be read, or is one of several.
    """
    named = list(dict.fromkeys(text for key, text in given_keys(argv) if key == CONFIG_FILE))
    if not named:
        return TomlFile("")
    if len(named) > 1:
        raise ValueError(f"{CONFIG_FILE} is given more than once: {', '.join(named)}; choose one")
    path = locate(named[0]) if named[0] else None
    if path is None:
        raise ValueError(f"{CONFIG_FILE} = {named[0]!r} does not exist")
    if path.is_dir():
        raise ValueError(f"{CONFIG_FILE} = {named[0]!r} is a folder; name the TOML file in it")
    return read_toml(path, str(path))


def _with_custom_sections(argv: list[str], file: TomlFile) -> type:
    """The configuration class, with what the user's own module adds.

    Raises:
        ValueError: the module cannot be imported, or has no such sections.
    """
    job = file.values.get("job", {})
    module = job.get("custom_config_module", "") if isinstance(job, dict) else ""
    for key, text in given_keys(argv):
        module = text if key == CUSTOM_MODULE else module
    if module in OURS or not isinstance(module, str):
        return FluxJobConfig
    key = f"{CUSTOM_MODULE} = {module!r}"
    try:
        custom = importlib.import_module(module).JobConfig
    except Exception as error:  # whatever the user's module raises
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{key} cannot be used ({reason})") from None
    if not is_dataclass(custom) or not all(is_dataclass(f.type) for f in dataclass_fields(custom)):
        raise ValueError(f"{key}: its JobConfig must be a dataclass whose fields are dataclasses")
    result = merged(FluxJobConfig, custom)  # type: ignore[arg-type]
    return result


def _from_file(
    file: TomlFile, keys: dict[str, Key], sections: list[str]
) -> Iterator[tuple[str, Any, str, list[str]]]:
    """(key, value, "", []) of each key of the file, or (name, None, what is wrong, keys meant)."""
    yield from _from_table(file, file.values, "", keys, sections)


def _from_table(
    file: TomlFile, table: dict[str, Any], prefix: str, keys: dict[str, Key], sections: list[str]
) -> Iterator[tuple[str, Any, str, list[str]]]:
    for last, value in table.items():
        name = prefix + last
        where = file.where(name)
        if name in sections:
            if isinstance(value, dict):
                yield from _from_table(file, value, f"{name}.", keys, sections)
            else:
                within = [key for key in keys if key.startswith(f"{name}.")]
                problem = f"{where}: {name} is a section: write [{name}], and its keys below"
                yield name, None, problem, within
        elif name == CONFIG_FILE:
            yield name, None, f"{where}: {name} belongs on the command line; remove it", []
        elif key := keys.get(name):
            try:
                yield name, from_toml(value, key.annotation), "", []
            except Unfit:
                yield name, None, _wrong_type(key, value, where), [name]
        elif isinstance(value, dict):
            hint = unknown_section(name, sections)
            yield name, None, f"{where}: the section [{name}] is unknown; {hint}", []
        else:
            problem, meant = unknown_key(name, keys, f"{where}: {name}")
            yield name, None, problem, meant


def _wrong_type(key: Key, value: Any, where: str) -> str:
    wanted = allowed(key.annotation)
    plain = wanted.startswith("one of") or (isinstance(value, list) and "list" in wanted)
    instead = "" if plain else f", not {what_it_is(value)}"
    return f"{where}: {key.name} = {shown(value)} must be {wanted}{instead}"


def _settle(reading: Reading) -> Iterator[tuple[int, str]]:
    """Values that depend on the machine, and what torchtitan's own files mean here; for the log."""
    config, given = reading.config, reading.given
    if config.training.test_mode:
        yield (
            logging.WARNING,
            f"training.test_mode = true: the encoders of {Path(TINY['t5_encoder']).parent} are "
            "used, whatever [encoder] names",
        )
        for key, path in TINY.items():
            setattr(config.encoder, key, path)
    prompts = config.inference.prompts_path
    if prompts.removeprefix("./") == THEIR_PROMPTS and locate(prompts) is None:
        config.inference.prompts_path = OUR_PROMPTS
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


def _without_doubtful(lines: list[str], reading: Reading) -> Iterator[str]:
    """What is wrong as far as it is known, with the lines of the file that say so.

    Where a key's value is not known the default stood in for it: what names that key is left out.
    """
    for line in lines:
        if any(_names(line, key) for key in reading.doubtful):
            continue
        named = re.findall(r"[a-z]\w*(?:\.\w+)+", line)
        where = next((reading.given[key] for key in named if key in reading.given), "")
        yield f"{where}: {line}" if where else line


def _names(line: str, key: str) -> bool:
    """Whether a message is about a key; the section may have been said before."""
    last = key.rpartition(".")[2]
    name = last if "_" in last else re.escape(key)
    return re.search(rf"\b{name}\b", line) is not None
