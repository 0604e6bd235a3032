"""Which columns of a table hold pictures and captions, and what stands in them."""

import json
from collections.abc import Collection
from typing import Any

import pyarrow as pa

from torchtitan_flux.data.sources.captions import CAPTION_NAMES, caption_value
from torchtitan_flux.data.sources.source import (
    CAPTION_COLUMN,
    IMAGE_COLUMN,
    SettingError,
    UnreadableItem,
)
from torchtitan_flux.formatting import listed

Column = tuple[str, ...]
"""Names of a column and of the fields within it that lead to the values, outermost first."""


def plain_type(of: pa.DataType) -> pa.DataType:
    """One type for all that store the same: views, dictionaries, 32 or 64 bits of offsets."""
    types = pa.types
    if types.is_dictionary(of):
        return plain_type(of.value_type)
    if types.is_struct(of):
        return pa.struct([(field.name, plain_type(field.type)) for field in of])
    if types.is_list(of) or types.is_large_list(of) or types.is_fixed_size_list(of):
        return pa.list_(plain_type(of.value_type))
    if types.is_string(of) or types.is_large_string(of) or types.is_string_view(of):
        return pa.string()
    if isinstance(of, pa.BaseExtensionType):
        return plain_type(of.storage_type)
    if types.is_binary(of) or types.is_large_binary(of) or types.is_binary_view(of):
        return pa.large_binary()
    return of


def image_column(schema: pa.Schema, named: str) -> Column:
    """The column of pictures: the one named, else "image", else the only one; SettingError."""
    fields = _fields(schema)
    if named:
        column = _named(fields, named, IMAGE_COLUMN)
        if not _holds_pictures(fields.get(column, pa.string())):
            raise SettingError(IMAGE_COLUMN, f"column {named!r} holds no encoded images")
        return column
    holding = [name for name in schema.names if _holds_pictures(fields[name,])]
    single = [name for name in holding if not pa.types.is_list(fields[name,])]
    found = single or holding
    name = _match("image", found) or (found[0] if len(found) == 1 else None)
    if name is None:
        which = f"one of {', '.join(found)} has to be named" if found else "no column holds images"
        raise SettingError(IMAGE_COLUMN, f"{which}; {_columns(fields)}")
    return (name,)


def caption_column(schema: pa.Schema, named: str) -> Column:
    """The column of captions: the one named, else the first of CAPTION_NAMES; SettingError.

    What is named may be a field of a struct or of JSON text, or hold the numbers of classes.
    """
    fields = _fields(schema)
    if named:
        column = _named(fields, named, CAPTION_COLUMN)
    else:
        exact = [name for name in CAPTION_NAMES if name in schema.names]
        found = [name for wanted in CAPTION_NAMES if (name := _match(wanted, schema.names))]
        if not found:
            names = ", ".join(CAPTION_NAMES)
            raise SettingError(CAPTION_COLUMN, f"no column is called {names}; {_columns(fields)}")
        column = ((exact or found)[0],)
    of = fields.get(column, pa.string())
    if not (_is_text(of) or (named and pa.types.is_integer(of))):
        raise SettingError(CAPTION_COLUMN, f"column {'.'.join(column)!r} holds no text")
    return column


def class_names(schema: pa.Schema, column: Column) -> list[str]:
    """What `datasets` says that the numbers in a column stand for; [] where it says nothing."""
    return _features(schema).get(column[0], {}).get("names") or []


def text_in(value: Any, below: Column, classes: list[str], item_id: str) -> Any:
    """What stands below a value of the caption column: a text, a list of texts, or None."""
    if isinstance(value, list):
        found = (text_in(element, below, classes, item_id) for element in value)
        return [text for text in found if isinstance(text, str)]
    if isinstance(value, int) and not below:
        return classes[value] if 0 <= value < len(classes) else str(value)
    if not below or value is None:
        return value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UnreadableItem(item_id, "its record is no JSON") from error
    if not isinstance(value, dict):
        return None
    return text_in(caption_value(value, below[0]), below[1:], classes, item_id)


def picture_in(scalar: Any, below: Column, item_id: str) -> tuple[pa.Buffer | None, str]:
    """What stands in the image column: (the file of a picture, its path where that is None)."""
    for name in below:
        scalar = _only(scalar, item_id)[name]
    scalar, path = _only(scalar, item_id), None
    if isinstance(scalar, pa.StructScalar):
        scalar, path = scalar["bytes"], scalar["path"].as_py() if "path" in scalar else None
    if scalar.is_valid:
        return scalar.as_buffer(), ""
    if not path:
        raise UnreadableItem(item_id, "has no image")
    return None, path


def _only(scalar: Any, item_id: str) -> Any:
    """The value, or the only one of a list."""
    while scalar.is_valid and isinstance(scalar, pa.ListScalar | pa.ExtensionScalar):
        if isinstance(scalar, pa.ListScalar) and len(scalar) > 1:
            raise UnreadableItem(item_id, f"holds a list of {len(scalar)} images, not one")
        scalar = next(iter(scalar), pa.NA) if isinstance(scalar, pa.ListScalar) else scalar.value
    if not scalar.is_valid:
        raise UnreadableItem(item_id, "has no image")
    return scalar


def _fields(schema: pa.Schema) -> dict[Column, pa.DataType]:
    """Every column and every field within one, columns first, with its plain type."""
    found: dict[Column, pa.DataType] = {(f.name,): plain_type(f.type) for f in schema}
    for column in (pending := list(found)):
        of = found[column]
        while pa.types.is_list(of):
            of = of.value_type
        if pa.types.is_struct(of):
            below = {(*column, field.name): field.type for field in of}
            found |= below
            pending.extend(below)
    return found


def _named(fields: dict[Column, pa.DataType], named: str, key: str) -> Column:
    """The column of a name, or the field of a dotted one; in any case where none fits exactly."""
    names = {".".join(column): column for column in reversed(fields)}
    if name := _match(named, names):
        return names[name]
    for name, column in names.items():  # JSON text: what it holds is seen row by row
        if _is_text(fields[column]) and named.lower().startswith(f"{name.lower()}."):
            return (*column, *named[len(name) + 1 :].split("."))
    raise SettingError(key, f"there is no column {named!r}; {_columns(fields)}")


def _match(wanted: str, names: Collection[str]) -> str | None:
    """The name itself, else the only one that differs from it by case alone."""
    if wanted in names:
        return wanted
    same = [name for name in names if name.lower() == wanted.lower()]
    return same[0] if len(same) == 1 else None


def _features(schema: pa.Schema) -> dict[str, dict]:
    """What `datasets` says of the columns, in the metadata that it leaves."""
    try:
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = stored["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _holds_pictures(of: pa.DataType) -> bool:
    if pa.types.is_list(of):
        return _holds_pictures(of.value_type)
    if pa.types.is_struct(of):
        return of.get_field_index("bytes") >= 0 and _holds_pictures(of.field("bytes").type)
    return pa.types.is_large_binary(of)


def _is_text(of: pa.DataType) -> bool:
    return _is_text(of.value_type) if pa.types.is_list(of) else pa.types.is_string(of)


def _columns(fields: dict[Column, pa.DataType]) -> str:
    return f"the columns are {listed(map('.'.join, fields), 20)}"
