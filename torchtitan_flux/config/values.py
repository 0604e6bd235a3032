"""A value for a key: taken from TOML or from the command line's text, or refused by its type.

The types that annotations of configuration dataclasses use: bool, int, float, str, Literal, list,
Optional and unions of these.
"""

import math
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

import tomli

NONE = "None"
"""How an optional key is unset where TOML has no word for it."""

NOTHING = object()


class Unfit(ValueError):
    """The value is not of the key's type."""


def from_toml(value: Any, annotation: Any) -> Any:
    """The value that a key of this type takes; whole numbers do for float.

    Raises:
        Unfit: it is of another type.
    """
    origin = get_origin(annotation)
    if _is_union(origin):
        if value == NONE and type(None) in get_args(annotation):
            return None
        for option in get_args(annotation):
            taken = _attempt(from_toml, value, option)
            if taken is not NOTHING:
                return taken
    elif origin is Literal:
        for option in get_args(annotation):
            if type(option) is type(value) and option == value:
                return value
    elif origin is list:
        if isinstance(value, list):
            return [from_toml(item, get_args(annotation)[0]) for item in value]
    elif annotation is float:
        if type(value) in (int, float) and not _is_no_float(value):
            return float(value)
    elif type(value) is annotation:
        return value
    raise Unfit


def from_text(texts: list[str], annotation: Any) -> Any:
    """What one or several arguments of a command line mean for a key of this type.

    A list takes several arguments, or one that is cut at its commas, or one in TOML's brackets.

    Raises:
        Unfit: they mean nothing of this type.
    """
    origin = get_origin(annotation)
    if _is_union(origin):
        if texts == [NONE] and type(None) in get_args(annotation):
            return None
        # text fits str always: tried last
        for option in sorted(get_args(annotation), key=lambda kind: kind is str):
            taken = _attempt(from_text, texts, option)
            if taken is not NOTHING:
                return taken
        raise Unfit
    if origin is list:
        return _list(texts, annotation)
    if len(texts) != 1:
        raise Unfit
    (text,) = texts
    if origin is Literal:
        for option in get_args(annotation):
            if str(option) == text:
                return option
        raise Unfit
    if annotation is str:
        return text
    if annotation is bool:
        if text.lower() not in ("true", "false"):
            raise Unfit
        return text.lower() == "true"
    if annotation in (int, float):
        try:
            return from_toml(annotation(text), annotation)
        except ValueError:
            raise Unfit from None
    raise Unfit


def _list(texts: list[str], annotation: Any) -> list[Any]:
    (item,) = get_args(annotation)
    if len(texts) == 1 and texts[0].startswith("["):
        try:
            return from_toml(tomli.loads(f"value = {texts[0]}")["value"], annotation)
        except tomli.TOMLDecodeError:
            raise Unfit from None
    if get_origin(item) is list:
        return [_list([text], item) for text in texts]
    if len(texts) == 1:
        # a comma before a space is one of a sentence: "a red fox, digital art" is one prompt
        texts = re.split(r",(?!\s)", texts[0]) if texts[0] else []
    return [from_text([text], item) for text in texts]


def allowed(annotation: Any) -> str:
    """The values of a type, in words: "a whole number", "one of 'a', 'b'"."""
    origin = get_origin(annotation)
    if _is_union(origin):
        options = get_args(annotation)
        if float in options:
            options = tuple(option for option in options if option is not int)
        words = [allowed(option) for option in options if option is not type(None)]
        unset = [f'"{NONE}"'] if type(None) in options else []
        return " or ".join(words + unset)
    if origin is Literal:
        return "one of " + ", ".join(shown(option) for option in get_args(annotation))
    if origin is list:
        return f"a list of {_plural(get_args(annotation)[0])}"
    return _WORDS.get(annotation, str(annotation))


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string in quotes",
}


def _plural(annotation: Any) -> str:
    if get_origin(annotation) is list:
        return f"lists of {_plural(get_args(annotation)[0])}"
    return {int: "whole numbers", float: "numbers", str: "strings"}.get(annotation, "values")


def what_it_is(value: Any) -> str:
    """The type of a TOML value that is not the wanted one, in words."""
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if type(value) is int and _is_no_float(value):
        return "one of more than 308 digits"
    return {
        bool: "a boolean",
        int: "a whole number",
        float: "a number with a fraction",
        str: "a string",
        list: "a list",
        dict: "a table",
    }.get(type(value), "a date or time")


def shown(value: Any) -> str:
    """A value as TOML would write it, in short."""
    text = toml_text(value)
    return text if len(text) <= 60 else text[:56] + " …" + text[-1]


def toml_text(value: Any) -> str:
    """A value in TOML's syntax."""
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        text = repr(value)
        return text if any(c in text for c in ".enif") else f"{text}.0"
    if isinstance(value, str):
        return '"' + "".join(_escaped(c) for c in value) + '"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_text(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name} = {toml_text(item)}' for name, item in value.items())}}}"
    return str(value)


def _escaped(c: str) -> str:
    special = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    if c in special:
        return special[c]
    return c if ord(c) >= 32 and ord(c) != 127 else f"\\u{ord(c):04x}"


def _is_no_float(number: int | float) -> bool:
    try:
        return math.isnan(number)
    except OverflowError:  # a whole number that is too large for one
        return True


def _is_union(origin: Any) -> bool:
    return origin in (Union, types.UnionType)


def _attempt(take: Any, value: Any, annotation: Any) -> Any:
    try:
        return take(value, annotation)
    except Unfit:
        return NOTHING
