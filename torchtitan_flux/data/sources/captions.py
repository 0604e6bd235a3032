"""Captions that stand beside pictures: in texts, in JSON records, in metadata files."""

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torchtitan_flux.data.sources.listing import LFS_POINTER, is_lfs_pointer, is_unicode
from torchtitan_flux.data.sources.source import CAPTION_COLUMN
from torchtitan_flux.formatting import listed

CAPTION_NAMES = ("text", "caption", "captions", "prompt")
"""Columns and keys that are taken for captions when none is named: the first that holds any."""

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
"""Files that caption the pictures of their folder, as Hugging Face's `imagefolder` has them."""

NO_CAPTION = "has no caption"
"""Why an item without any caption is not read, unless `data.default_caption` stands in for it."""

_LINE_END = re.compile("\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"

Captions = tuple[tuple[str, ...], str]
"""Captions and "", or none and why."""


def captions_of(value: object, by_line: bool) -> Captions:
    """Captions from a text, which is one, or from a list of texts, which is as many as it holds.

    With `by_line`, every line of a text that is not blank is a caption of its own.
    """
    texts = value if isinstance(value, list | tuple) else [value]
    texts = [text for text in texts if isinstance(text, str)]
    if by_line:
        texts = [line for text in texts for line in lines_of(text)]
    captions = tuple(text.strip() for text in texts if text.strip())
    return captions, "" if captions else NO_CAPTION


def lines_of(text: str) -> list[str]:
    """The lines of a text that are not blank; str.splitlines would also split at U+2028, VT, …"""
    return [line for line in _LINE_END.split(text) if line.strip()]


def captions_of_file(data: bytes, suffix: str, column: str, by_line: bool) -> Captions:
    """Captions of a text file, or of a .json that holds one record with the field `column`."""
    if is_lfs_pointer(data):
        return (), f"its {suffix} {LFS_POINTER}"
    if suffix != ".json":
        try:
            return captions_of(_decoded(data.removeprefix(_BOM)), by_line)
        except ValueError as error:
            return (), f"its {suffix} {error}"
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return (), "its .json is no JSON"
    if not isinstance(record, dict):
        return (), "its .json holds no object"
    if column and _field(record, column) is None:
        return (), f"its .json has no {column!r}"
    return captions_of(caption_value(record, column), by_line)


def _decoded(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8") from error
    if "\0" in text:  # UTF-16 of plain letters is valid UTF-8, with a zero beside each of them
        raise ValueError("is not UTF-8: it has zero bytes")
    return text


def caption_value(record: Mapping[str, Any], column: str) -> Any:
    """What a record says in a field: the one named, else the first of CAPTION_NAMES that says any.

    Names of fields are found in any case where the exact one is not there; "json.caption" is the
    field caption of the field json.
    """
    values = (_field(record, name) for name in ((column,) if column else CAPTION_NAMES))
    return next(filter(None, values), None)


def _field(record: Any, name: str) -> Any:
    """The value of a field; None where there is none."""
    if not isinstance(record, Mapping):
        return None
    alike = (key for key in record if isinstance(key, str) and key.lower() == name.lower())
    key = name if name in record else next(alike, None)
    if key is not None:
        return record[key]
    outer, dot, inner = name.partition(".")
    return _field(_field(record, outer), inner) if dot else None


class Uncaptioned(ValueError):
    """No line of a metadata file has a caption; says where captions are looked for."""


def metadata_captions(root: Path, name: str, column: str) -> Iterator[tuple[str, Any]]:
    """Rows of a metadata file: (path of a picture relative to `root`, what stands for captions).

    `name` is the file's path relative to `root`, `column` where captions stand, "" for the first of
    CAPTION_NAMES. ValueError where a line says something else; Uncaptioned, after all rows, where
    none of them has a field that captions may stand in.
    """
    folder, path, number = name.rpartition("/")[0], root / name, 0
    wanted = (column,) if column else CAPTION_NAMES
    captioned = False
    fields: dict[str, None] = {}

    def lines() -> Iterator[str]:
        nonlocal number
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and is_lfs_pointer(line):
                    raise ValueError(LFS_POINTER)
                yield _decoded(line.removeprefix(_BOM) if number == 1 else line)

    try:
        for record in (_csv_rows if name.endswith(".csv") else _json_lines)(lines()):
            file_name = _field(record, "file_name")
            if not isinstance(file_name, str) or not file_name:
                raise ValueError(f"no name stands in 'file_name': {record!r:.200}")
            captioned = captioned or any(_field(record, one) is not None for one in wanted)
            fields |= {} if captioned else dict.fromkeys(record)
            if "\\" in file_name and not os.path.lexists(root / folder / file_name):
                file_name = file_name.replace("\\", "/")  # written on Windows
            yield path_inside(folder, file_name), caption_value(record, column)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    if fields and not captioned:
        raise Uncaptioned(
            f"{path}: no line has {' or '.join(map(repr, wanted))}, only "
            f"{listed(map(repr, fields), 20)}; name what holds captions in {CAPTION_COLUMN}"
        )


def _json_lines(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for record in (json.loads(line) for line in lines if line.strip()):
        if not isinstance(record, dict):
            raise ValueError("is no JSON object")
        yield record


def _csv_rows(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Rows of a table whose first line names its columns, between commas, semicolons or tabs."""
    header = next(lines, "")
    separator = next((mark for mark in ",;\t" if "file_name" in _columns(header, mark)), ",")
    names = _columns(header, separator)
    if twice := next((name for name in names if name and names.count(name) > 1), ""):
        raise ValueError(f"has two columns called {twice!r}")
    style = {"strict": True, "delimiter": separator, "skipinitialspace": True}
    table = csv.DictReader(lines, names, **style)
    begin = 2
    try:
        for row in table:
            if None in row:
                raise ValueError(
                    f"has more fields than line 1 has columns ({listed(map(repr, names))}); a "
                    f'text with {separator!r} in it has to stand in "quotes"'
                )
            yield {name: value and value.strip() for name, value in row.items()}
            begin = table.line_num + 2
    except csv.Error as error:
        raise ValueError(f"{error}; its row begins in line {begin}") from error


def _columns(line: str, separator: str) -> list[str]:
    header = csv.reader([line], delimiter=separator, skipinitialspace=True)
    return [name.strip().lower() for name in next(header, [])]


def path_inside(folder: str, file_name: str) -> str:
    """`file_name`, relative to `folder`, as a path relative to the root; it may not leave that."""
    path = os.path.normpath(os.path.join(folder, file_name))
    if file_name.startswith("/"):
        raise ValueError(f"{file_name!r} is not relative to the file it stands in")
    if path.split("/")[0] == "..":
        raise ValueError(f"{file_name!r} is outside of the folder")
    if "\0" in path or not is_unicode(path):
        raise ValueError(f"{file_name!r} cannot be the name of a file")
    return path
