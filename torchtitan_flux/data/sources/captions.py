"""Captions that stand beside pictures: in texts, in JSON records, in metadata files."""

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torchtitan_flux.data.sources.listing import LFS_POINTER, is_lfs_pointer
from torchtitan_flux.data.sources.source import CAPTION_COLUMN
from torchtitan_flux.formatting import listed

CAPTION_NAMES = ("text", "caption", "captions", "prompt")
"""Columns and keys that are taken for captions when none is named: the first that holds any."""

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
"""Files that caption the pictures of their folder, as Hugging Face's `imagefolder` has them."""

NO_CAPTION = "has no caption"
"""Why an item without any caption is not read, unless `data.default_caption` stands in for it."""

_LINE_END = re.compile("\r\n|\n|\r")
_MISSING = object()

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
    """Captions of a text file, or of a .json that holds one record.

    Args:
        data: of the file.
        suffix: of its name, with the dot.
        column: of a record, as in `caption_value`.
        by_line: as in `captions_of`.
    """
    if is_lfs_pointer(data):
        return (), f"its {suffix} {LFS_POINTER}"
    if suffix != ".json":
        try:
            return captions_of(_decoded(data.removeprefix(b"\xef\xbb\xbf")), by_line)
        except ValueError as error:
            return (), f"its {suffix} {error}"
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return (), "its .json is no JSON"
    if not isinstance(record, dict):
        return (), "its .json holds no object"
    if column and not has_field(record, column):
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

    Args:
        record: names of fields are found in any case where the exact one is not there.
        column: name of the field; "json.caption" is the field caption of the field json; "" for
            none.
    """
    names = (column,) if column else CAPTION_NAMES
    values = (_field(record, name) for name in names)
    return next((value for value in values if value and value is not _MISSING), None)


def has_field(record: Mapping[str, Any], name: str) -> bool:
    """Whether a record has a field, which `caption_value` would find."""
    return _field(record, name) is not _MISSING


def _field(record: Any, name: str) -> Any:
    """The value of a field; _MISSING where there is none."""
    if not isinstance(record, Mapping):
        return _MISSING
    if name in record:
        return record[name]
    found = [key for key in record if isinstance(key, str) and key.lower() == name.lower()]
    if found:
        return record[found[0]]
    outer, dot, inner = name.partition(".")
    return _field(_field(record, outer), inner) if dot else _MISSING


class Uncaptioned(ValueError):
    """No line of a metadata file has a caption; says where captions are looked for."""


def metadata_captions(root: Path, name: str, column: str) -> Iterator[tuple[str, Any]]:
    """Rows of a metadata file: (path of a picture relative to `root`, what stands for captions).

    Args:
        root: folder of the data.
        name: path of the file relative to it, metadata.jsonl or metadata.csv.
        column: where captions stand; "" for the first of CAPTION_NAMES.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it, or a line of it, says something else.
        Uncaptioned: after all rows, where none of them has a field that captions may stand in.
    """
    folder, path = name.rpartition("/")[0], root / name
    wanted = (column,) if column else CAPTION_NAMES
    captioned, line = False, 0
    fields: dict[str, None] = {}
    records = _csv_records if name.endswith(".csv") else _json_records
    with path.open("rb") as file:
        try:
            for line, record in records(_lines(file)):
                file_name = _field(record, "file_name")
                if not isinstance(file_name, str) or not file_name:
                    there = f"only {_quoted(record)}"
                    if file_name is not _MISSING:
                        there = f"it is {file_name!r}, not the name of a file"
                    raise _Line(line, f"has no 'file_name', {there}")
                captioned = captioned or any(has_field(record, known) for known in wanted)
                if not captioned:
                    fields |= dict.fromkeys(record)
                if "\\" in file_name and not os.path.lexists(root / folder / file_name):
                    file_name = file_name.replace("\\", "/")  # written on Windows
                try:
                    inside = path_inside(folder, file_name)
                except ValueError as error:
                    raise _Line(line, str(error)) from error
                yield inside, caption_value(record, column)
        except _Line as error:
            raise ValueError(f"{path}, line {error}") from error
    if line and not captioned:
        raise Uncaptioned(
            f"{path}: no line has {' or '.join(map(repr, wanted))}, only {_quoted(fields)}; name "
            f"the one that holds captions in {CAPTION_COLUMN}"
        )


class _Line(Exception):
    """What is wrong with a line, by its number."""

    def __init__(self, number: int, what: object):
        super().__init__(f"{number}: {what}")


def _quoted(fields: Mapping[str, Any]) -> str:
    return listed(map(repr, fields), 20) or "nothing"


def _lines(file: Iterator[bytes]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, 1):
        if number == 1 and is_lfs_pointer(line):
            raise _Line(1, LFS_POINTER)
        try:
            yield number, _decoded(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        except ValueError as error:
            raise _Line(number, error) from error


def _json_records(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in lines:
        if text.strip():
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise _Line(number, error) from error
            if not isinstance(record, dict):
                raise _Line(number, "is no JSON object")
            yield number, record


def _csv_records(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a table whose first line names its columns, between commas, semicolons or tabs.

    Where a name has a space before or behind it, spaces around values do not count either.
    """
    _, first = next(lines, (1, ""))
    separator = next((mark for mark in ",;\t" if "file_name" in _columns(first, mark)), ",")
    spaced = any(name != name.strip(" ") for name in first.rstrip("\r\n").split(separator))
    names = _columns(first, separator)
    if twice := next((name for name in names if name and names.count(name) > 1), ""):
        raise _Line(1, f"has two columns called {twice!r}")
    table = csv.DictReader(
        (text for _, text in lines),
        names,
        strict=True,
        delimiter=separator,
        skipinitialspace=spaced,
    )
    while True:
        line = table.line_num + 2  # where the row begins
        try:
            record: dict[str | Any, Any] = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            raise _Line(line, error) from error
        if None in record:
            raise _Line(
                table.line_num + 1,
                f"has more fields than line 1 has columns ({listed(map(repr, names))}); a text "
                f'with {separator!r} in it has to stand in "quotes"',
            )
        if spaced:
            record = {name: value and value.strip() for name, value in record.items()}
        yield table.line_num + 1, record


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
    if "\0" in path or path != path.encode("utf-8", "replace").decode():
        raise ValueError(f"{file_name!r} cannot be the name of a file")
    return path
