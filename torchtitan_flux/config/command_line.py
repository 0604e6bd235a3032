"""`--section.key value` -> what the command line gives for each key, or what is wrong with it.

The forms are torchtitan's (tyro's): `--section.key value`, `--section.key=value`, `--section.key`
and `--section.no-key` for switches, dashes for underscores, several values for a list. A key that
is given again counts as given last.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torchtitan_flux.config.schema import Key
from torchtitan_flux.config.unknown_keys import unknown_key
from torchtitan_flux.config.values import Unfit, allowed, from_text


@dataclass(frozen=True)
class Override:
    """What the command line gives for a key.

    Attributes:
        option: as it was typed, with its values.
        value: of the key's type.
    """

    option: str
    value: Any


@dataclass(frozen=True)
class CommandLine:
    """Attributes:
    overrides: key -> what is given for it.
    found: what is wrong, a line each.
    doubtful: keys whose value is not known, because something is wrong.
    repeated: keys that were given several values, a line each.
    """

    overrides: dict[str, Override]
    found: list[str]
    doubtful: set[str]
    repeated: list[str]


def parse(argv: list[str], keys: dict[str, Key]) -> CommandLine:
    """Everything that the command line says about `keys`, and everything wrong with it."""
    result = CommandLine({}, [], set(), [])
    for option, texts in _options(argv):
        name, switch = _name(option, keys)
        key = keys.get(name)
        if key is not None and not _is_list(key):
            result.found.extend(_stray(text, keys) for text in texts[1:])
            texts = texts[:1]
        if not option:
            result.found.extend(_stray(text, keys) for text in texts)
        elif key is None:
            line, meant = unknown_key(name, keys, f"--{option}")
            result.found.append(line)
            result.doubtful.update(meant)
        else:
            _take(key, option, texts, switch, result)
    return result


def _take(key: Key, option: str, texts: list[str], switch: bool, result: CommandLine) -> None:
    typed = " ".join([f"--{option}", *texts])
    try:
        value = _value(key, texts, switch)
    except Unfit:
        result.found.append(f"{typed}: {_wanted(key, switch)}")
        result.doubtful.add(key.name)
        return
    before = result.overrides.get(key.name)
    if before is not None and before.value != value:
        result.repeated.append(f"{before.option} does not count: {typed} comes later")
    result.overrides[key.name] = Override(typed, value)


def _is_list(key: Key) -> bool:
    return "list" in str(key.annotation)


def _stray(text: str, keys: dict[str, Key]) -> str:
    meant = f"; did you mean --{text}?" if text.partition("=")[0] in keys else ""
    return f"{text!r} on the command line belongs to no key{meant or FORM}"


FORM = "; keys are given as --section.key value"


def given_keys(argv: list[str]) -> Iterator[tuple[str, str]]:
    """(section.key, text) of every option, whether it exists or not; "" where there is no text."""
    for option, texts in _options(argv):
        yield _plain(option), texts[0] if texts else ""


def _options(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(option without dashes, its values); a value that belongs to no option comes with ""."""
    option, texts = "", []
    for argument in argv:
        if argument.startswith("--"):
            if option:
                yield option, texts
            option, equals, text = argument[2:].partition("=")
            texts = [text] if equals else []
        elif option:
            texts.append(argument)
        else:
            yield "", [argument]
    if option:
        yield option, texts


def _plain(option: str) -> str:
    return option.replace("-", "_")


def _name(option: str, keys: dict[str, Key]) -> tuple[str, bool]:
    """The key that an option means, and what it says where it has no value."""
    name = _plain(option)
    section, _, last = name.rpartition(".")
    positive = f"{section}.{last.removeprefix('no_')}"
    if name not in keys and last.startswith("no_") and positive in keys:
        return positive, False
    return name, True


def _value(key: Key, texts: list[str], switch: bool) -> Any:
    if key.annotation is bool and not texts:
        return switch
    if not switch:
        raise Unfit  # --section.no-key says all there is to say
    if not texts:
        raise Unfit
    return from_text(texts, key.annotation)


def _wanted(key: Key, switch: bool) -> str:
    if key.annotation is bool:
        section, _, name = key.name.rpartition(".")
        return f"it is --{key.name} or --{section}.no-{name}, without a value"
    if not switch:
        return f"--{key.name} is no switch; its value must be {allowed(key.annotation)}"
    return f"the value must be {allowed(key.annotation).replace(' in quotes', '')}"
