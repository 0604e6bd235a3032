"""`--section.key value` -> what the command line gives for each key, or what is wrong with it.

The forms are torchtitan's (tyro's): `--section.key value`, `--section.key=value`, `--section.key`
and `--section.no-key` for switches, dashes for underscores, several values for a list. A key that
is given again counts as given last.
"""

from collections.abc import Iterator
from typing import Any

from torchtitan_flux.config.problems import Problem
from torchtitan_flux.config.schema import Key, unknown_name
from torchtitan_flux.config.values import from_text, type_name


def parse(argv: list[str], keys: dict[str, Key]) -> tuple[dict[str, Any], list[Problem], set[str]]:
    """What the command line says about `keys`.

    Returns:
        (key -> its value, what is wrong, keys whose value is not known because it is wrong).
    """
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    in_doubt: set[str] = set()
    for option, texts in _options(argv):
        name = option.replace("-", "_")
        section, _, last = name.rpartition(".")
        positive = f"{section}.{last.removeprefix('no_')}"
        switch = name in keys or positive not in keys
        key = keys.get(name if switch else positive)
        if option and key is None:
            problem, meant = unknown_name(name, keys, f"--{option}")
            problems.append(problem)
            in_doubt.update(meant)
            continue
        count = len(texts) if key and "list" in str(key.annotation) else bool(option)
        problems += [
            Problem(repr(text), "belongs to no key; they are given as --section.key value")
            for text in texts[count:]
        ]
        if key is not None:
            try:
                values[key.name] = _value(key, texts[:count], switch)
            except ValueError as error:
                given = " ".join([f"--{option}", *texts[:count]])
                problems.append(Problem(key.name, str(error), given=given))
                in_doubt.add(key.name)
    return values, problems, in_doubt


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


def _value(key: Key, texts: list[str], switch: bool) -> Any:
    if key.annotation is bool and not texts:
        return switch
    if not switch:
        raise ValueError("only switches are given in this form, and without a value")
    if not texts:
        raise ValueError(f"needs a value ({type_name(key.annotation)})")
    return from_text(texts, key.annotation)
