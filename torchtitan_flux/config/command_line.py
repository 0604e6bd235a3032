"""`--section.key value` -> what the command line gives for each key, or what is wrong with it.

The forms are torchtitan's (tyro's): `--section.key value`, `--section.key=value`, `--section.key`
and `--section.no-key` for switches, dashes for underscores, several values for a list. A key that
is given again counts as given last.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torchtitan_flux.config.problems import Problem
from torchtitan_flux.config.schema import Key
from torchtitan_flux.config.unknown_keys import unknown_key
from torchtitan_flux.config.values import from_text, type_name


@dataclass
class CommandLine:
    """What a command line says.

    Attributes:
        values: key -> its value.
        typed: key -> the option with its values, as they were typed.
        problems: what is wrong.
        unknown: keys whose value is not known, because something is wrong with it.
        repeated: a line for each key that was given several values.
    """

    values: dict[str, Any] = field(default_factory=dict)
    typed: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    repeated: list[str] = field(default_factory=list)


def parse(argv: list[str], keys: dict[str, Key]) -> CommandLine:
    """Everything that the command line says about `keys`, and everything wrong with it."""
    line = CommandLine()
    for option, texts in _options(argv):
        name, switch = _name(option, keys)
        key = keys.get(name)
        if option and key is None:
            problem, meant = unknown_key(name, keys, f"--{option}")
            line.problems.append(problem)
            line.unknown.update(meant)
            continue
        count = len(texts) if key and "list" in str(key.annotation) else bool(option)
        for text in texts[count:]:
            known = text.partition("=")[0] in keys
            remedy = f"did you mean --{text}?" if known else "keys are given as --section.key value"
            line.problems.append(Problem(repr(text), f"belongs to no key; {remedy}"))
        if key is None:
            continue
        typed = " ".join([f"--{option}", *texts[:count]])
        try:
            value = _value(key, texts[:count], switch)
        except ValueError as error:
            line.problems.append(Problem(key.name, str(error), given=typed))
            line.unknown.add(key.name)
            continue
        if line.values.get(key.name, value) != value:
            line.repeated.append(f"{line.typed[key.name]} does not count: {typed} comes later")
        line.values[key.name], line.typed[key.name] = value, typed
    return line


def given_keys(argv: list[str]) -> Iterator[tuple[str, str]]:
    """(section.key, text) of every option, whether it exists or not; "" where there is no text."""
    for option, texts in _options(argv):
        yield option.replace("-", "_"), texts[0] if texts else ""


def _options(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(option without dashes, its values); values before any option come with ""."""
    option, texts = "", []
    for argument in argv:
        if argument.startswith("--"):
            if option or texts:
                yield option, texts
            option, equals, text = argument[2:].partition("=")
            texts = [text] if equals else []
        else:
            texts.append(argument)
    if option or texts:
        yield option, texts


def _name(option: str, keys: dict[str, Key]) -> tuple[str, bool]:
    """The key that an option means, and what it says where it has no value."""
    name = option.replace("-", "_")
    section, _, last = name.rpartition(".")
    positive = f"{section}.{last.removeprefix('no_')}"
    if name not in keys and last.startswith("no_") and positive in keys:
        return positive, False
    return name, True


def _value(key: Key, texts: list[str], switch: bool) -> Any:
    if key.annotation is bool and not texts:
        return switch
    if not switch:
        raise ValueError("only switches are given in this form, and without a value")
    if not texts:
        raise ValueError(f"needs a value ({type_name(key.annotation)})")
    return from_text(texts, key.annotation)
