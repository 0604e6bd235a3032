"""Which columns of a table hold pictures and captions, and what stands in them."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from torchtitan_flux.data.sources.captions import CAPTION_NAMES, caption_value
from torchtitan_flux.data.sources.source import UnreadableItem


class Column(NamedTuple):
    """A column of a table, or a field within one.

    Attributes:
        name: of the column.
        below: names of the fields that lead to the values, from the column inwards.
    """

    name: str
    below: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ".".join((self.name, *self.below))


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
    """The column that holds pictures: the one named, else "image", else the only one.

    Args:
        schema: columns and their types.
        named: a column, or column.field for a field within one; "" finds it.

    Raises:
        ValueError: there is none, or more than one; names the key.
    """
    if named:
        column = _named(schema, named, "data.image_column")
        if not _holds_pictures(_type_of(schema, column)):
            raise ValueError(
                f"data.image_column: column {named!r} holds no encoded images; {_listed(schema)}"
            )
        return column
    declared = _declared_images(schema)
    found = [name for name in schema.names if name in declared]
    holding = [field for field in schema if _holds_pictures(field.type)]
    single = [field.name for field in holding if not pa.types.is_list(plain_type(field.type))]
    found = found or single or [field.name for field in holding]
    if name := _match("image", found):
        return Column(name)
    if len(found) != 1:
        which = f"one of {', '.join(found)} has to be named" if found else "no column holds images"
        fields = [str(c) for c, of in _fields(schema) if _holds_pictures(of)]
        also = f"; images also stand in {', '.join(fields)}" if fields and not found else ""
        raise ValueError(f"data.image_column: {which}; {_listed(schema)}{also}")
    return Column(found[0])


def caption_column(schema: pa.Schema, named: str) -> Column:
    """The column that holds captions: the one named, else the first of CAPTION_NAMES.

    Args:
        schema: columns and their types.
        named: a column, or column.field for a field of a struct or of JSON text; "" finds it.

    Raises:
        ValueError: there is none, or it holds no text; names the key.
    """
    if named:
        column = _named(schema, named, "data.caption_column")
    else:
        exact = (name for name in CAPTION_NAMES if name in schema.names)
        alike = (name for wanted in CAPTION_NAMES if (name := _match(wanted, schema.names)))
        name = next(exact, None) or next(alike, None)
        if name is None:
            fields = [str(c) for c, of in _fields(schema) if _is_text(of)]
            also = f"; text also stands in {', '.join(fields)}" if fields else ""
            raise ValueError(
                f"data.caption_column: no column is called {', '.join(CAPTION_NAMES)}; "
                f"{_listed(schema)}{also}"
            )
        column = Column(name)
    if not _is_text(_type_of(schema, column)):
        raise ValueError(
            f"data.caption_column: column {str(column)!r} holds no text; {_listed(schema)}"
        )
    return column


def text_of(value: Any, below: tuple[str, ...], item_id: str) -> Any:
    """What stands below a value of the caption column: a text, a list of texts, or None.

    Raises:
        UnreadableItem: a text that fields were to be found in is no JSON.
    """
    if isinstance(value, list):
        found = (text_of(element, below, item_id) for element in value)
        return [text for text in found if isinstance(text, str)]
    if not below or value is None:
        return value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UnreadableItem(item_id, "its record is no JSON") from error
    if not isinstance(value, dict):
        return None
    return text_of(caption_value(value, below[0]), below[1:], item_id)


def picture_of(
    scalar: pa.Scalar, below: tuple[str, ...], item_id: str
) -> tuple[pa.Buffer | None, str]:
    """What stands in the image column: (the file of a picture, its path where that is None).

    Raises:
        UnreadableItem: nothing, or several pictures.
    """
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
    while scalar.is_valid and isinstance(scalar, pa.ListScalar):
        if len(scalar) > 1:
            raise UnreadableItem(item_id, f"holds a list of {len(scalar)} images, not one")
        if not len(scalar):
            raise UnreadableItem(item_id, "has no image")
        scalar = scalar[0]
    if isinstance(scalar, pa.ExtensionScalar):
        return _only(scalar.value, item_id)
    if not scalar.is_valid:
        raise UnreadableItem(item_id, "has no image")
    return scalar


def _named(schema: pa.Schema, named: str, key: str) -> Column:
    """The column of a name, or the field of a dotted one; in any case where none fits exactly."""
    name = _match(named, schema.names)
    if name:
        return Column(name)
    parts = named.split(".")
    for count in range(1, len(parts)):
        name = _match(".".join(parts[:count]), schema.names)
        below = _below(schema.field(name).type, tuple(parts[count:])) if name else None
        if name and below:
            return Column(name, below)
    raise ValueError(f"{key}: there is no column {named!r}; {_listed(schema)}")


def _below(of: pa.DataType, wanted: tuple[str, ...]) -> tuple[str, ...] | None:
    """The fields that lead to a dotted name, as they are spelled; None where there are none."""
    of = plain_type(of)
    if not wanted or pa.types.is_string(of):
        return wanted  # JSON text: what it holds is seen row by row
    if pa.types.is_list(of):
        return _below(of.value_type, wanted)
    if not pa.types.is_struct(of):
        return None
    name = _match(wanted[0], [field.name for field in of])
    below = _below(of.field(name).type, wanted[1:]) if name else None
    return None if name is None or below is None else (name, *below)


def _match(wanted: str, names: list[str]) -> str | None:
    """The name itself, else the only one that differs from it by case alone."""
    if wanted in names:
        return wanted
    alike = [name for name in names if name.lower() == wanted.lower()]
    return alike[0] if len(alike) == 1 else None


def _type_of(schema: pa.Schema, column: Column) -> pa.DataType:
    """The type at a column's values; that of text where they are fields of JSON."""
    of = plain_type(schema.field(column.name).type)
    for name in column.below:
        while pa.types.is_list(of):
            of = of.value_type
        if pa.types.is_string(of):
            return of
        of = of.field(name).type
    return of


def _fields(schema: pa.Schema) -> Iterator[tuple[Column, pa.DataType]]:
    """Every field within a column, with its type."""

    def within(column: Column, of: pa.DataType) -> Iterator[tuple[Column, pa.DataType]]:
        while pa.types.is_list(of):
            of = of.value_type
        if pa.types.is_struct(of):
            for field in of:
                below = Column(column.name, (*column.below, field.name))
                yield below, field.type
                yield from within(below, field.type)

    for field in schema:
        yield from within(Column(field.name), plain_type(field.type))


def _declared_images(schema: pa.Schema) -> set[str]:
    """Columns that `datasets` says are images, in the metadata that it leaves."""
    stored = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(stored)["info"]["features"]
        return {name for name, feature in features.items() if feature.get("_type") == "Image"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()


def _holds_pictures(of: pa.DataType) -> bool:
    of = plain_type(of)
    if pa.types.is_list(of):
        return _holds_pictures(of.value_type)
    if pa.types.is_struct(of):
        return of.get_field_index("bytes") >= 0 and _holds_pictures(of.field("bytes").type)
    return pa.types.is_large_binary(of)


def _is_text(of: pa.DataType) -> bool:
    of = plain_type(of)
    return _is_text(of.value_type) if pa.types.is_list(of) else pa.types.is_string(of)


def _listed(schema: pa.Schema) -> str:
    return f"the columns are {', '.join(schema.names)}"
