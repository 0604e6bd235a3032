"""A value for a key, from TOML or from the command line's text: pydantic checks its type."""

import functools
import inspect
import json
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

import tomli
from pydantic import TypeAdapter, ValidationError

NONE = "None"
"""How an optional key is unset where TOML has no word for it."""


@functools.cache
def _adapter(annotation: Any) -> TypeAdapter:
    return TypeAdapter(annotation)


def from_toml(value: Any, annotation: Any) -> Any:
    """The value that a key of this type takes; whole numbers do for float.

    Raises:
        ValueError: it is of another type.
    """
    if value == NONE and types.NoneType in _options(annotation):
        return None
    try:
        return _adapter(annotation).validate_python(value, strict=True)
    except ValidationError as error:
        raise ValueError(_reasons(error)) from None


def from_text(texts: list[str], annotation: Any) -> Any:
    """What one or several arguments of a command line mean for a key of this type.

    A list takes several arguments, or one that is cut at its commas, or one in TOML's brackets.

    Raises:
        ValueError: they mean nothing of this type.
    """
    options = _options(annotation)
    if texts == [NONE] and types.NoneType in options:
        return None
    for option in options:
        if get_origin(option) is list:
            return from_toml(_items(texts, *get_args(option)), annotation)
        if get_origin(option) is Literal:
            choices = {str(choice): choice for choice in get_args(option)}
            return from_toml(choices.get(texts[0], texts[0]), annotation)
    try:
        return _adapter(annotation).validate_strings(texts[0])
    except ValidationError as error:
        raise ValueError(_reasons(error)) from None


def _items(texts: list[str], item: Any) -> list[Any]:
    if len(texts) == 1 and texts[0].startswith("["):
        return tomli.loads(f"value = {texts[0]}")["value"]
    if get_origin(item) is list:
        return [_items([text], *get_args(item)) for text in texts]
    if len(texts) == 1:
        # a comma before a space is one of a sentence: "a red fox, digital art" is one prompt
        texts = re.split(r",(?!\s)", texts[0]) if texts[0] else []
    return [from_text([text], item) for text in texts]


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _reasons(error: ValidationError) -> str:
    """Pydantic's messages as one, without repetition; a union has one for each member."""
    messages = []
    for item in error.errors():
        number = next((f"item {place} " for place in item["loc"] if isinstance(place, int)), "")
        messages.append(number + item["msg"].replace("Input should be", "must be"))
    return " or ".join(dict.fromkeys(messages))


def type_name(annotation: Any) -> str:
    """A type as Python writes it: "int", "float | None", "Literal['a', 'b']"."""
    return inspect.formatannotation(annotation)


def shown(value: Any) -> str:
    """A value as TOML would write it; in short, unless it may be a path."""
    text = toml_text(value)
    return text if len(text) <= 60 or isinstance(value, str) else text[:56] + " …" + text[-1]


def toml_text(value: Any) -> str:
    """A value in TOML's syntax, in which JSON's is but for numbers that are not finite."""
    if value is None:
        return f'"{NONE}"'
    text = json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")
    return {"Infinity": "inf", "-Infinity": "-inf", "NaN": "nan"}.get(text, text)
