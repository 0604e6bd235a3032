"""Captions that stand beside pictures: in texts, in JSON records, in metadata files."""

import csv
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from torchtitan_flux.data.sources.foreign import HEAD, is_lfs_pointer
from torchtitan_flux.data.sources.source import UnreadableItem

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


def captions_of(value: object, item_id: str, by_line: bool) -> tuple[str, ...]:
    """Captions from what stands beside an image: a text, or a list of texts.

    Args:
        value: a text is one caption, a list of texts as many as it holds.
        item_id: for the message.
        by_line: every line of a text that is not blank is a caption of its own.

    Raises:
        UnreadableItem: nothing is left.
    """
    texts = value if isinstance(value, list | tuple) else [value]
    texts = [text for text in texts if isinstance(text, str)]
    if by_line:
        texts = [line for text in texts for line in lines_of(text)]
    captions = tuple(text.strip() for text in texts if text.strip())
    if not captions:
        raise UnreadableItem(item_id, NO_CAPTION)
    return captions


def lines_of(text: str) -> list[str]:
    """The lines of a text that are not blank; str.splitlines would also split at U+2028, VT, …"""
    return [line for line in _LINE_END.split(text) if line.strip()]


def captions_or_reason(value: object, by_line: bool) -> Captions:
    """What a text, or a list of texts, says; `by_line` as in `captions_of`."""
    try:
        return captions_of(value, "", by_line), ""
    except UnreadableItem as error:
        return (), error.reason


def captions_of_text(data: bytes, by_line: bool, suffix: str = ".txt") -> Captions:
    """Captions of a text file; `by_line` as in `captions_of`."""
    if is_lfs_pointer(data):
        return (), f"its {suffix} is a Git LFS pointer, run `git lfs pull`"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return (), f"its {suffix} is not UTF-8"
    if "\0" in text:  # UTF-16 of plain letters is valid UTF-8, with a zero beside each of them
        return (), f"its {suffix} is not UTF-8: it has zero bytes"
    return captions_or_reason(text, by_line)


def captions_of_json(data: bytes, column: str, by_line: bool) -> Captions:
    """Captions of a file that holds one JSON record.

    Args:
        data: of the file.
        column: as in `caption_value`.
        by_line: as in `captions_of`.
    """
    if is_lfs_pointer(data):
        return (), "its .json is a Git LFS pointer, run `git lfs pull`"
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return (), "its .json is no JSON"
    if not isinstance(record, dict):
        return (), "its .json holds no object"
    if column and not has_field(record, column):
        return (), f"its .json has no {column!r}"
    return captions_or_reason(caption_value(record, column), by_line)


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
    if not dot:
        return _MISSING
    below = _field(record, outer)
    return _MISSING if below is _MISSING else _field(below, inner)


class Uncaptioned(ValueError):
    """No line of a metadata file has a caption; says where captions are looked for."""


def metadata_captions(root: Path, name: str, column: str) -> Iterator[tuple[str, Any]]:
    """Rows of a metadata file: (path of a picture relative to `root`, what stands for captions).

    Args:
        root: folder of the data.
        name: path of the file relative to it, metadata.jsonl or metadata.csv.
        column: where captions stand; "" for the first of CAPTION_NAMES.

    Raises:
        ValueError: the file cannot be opened, or it or a line of it says something else.
        Uncaptioned: after all rows, where none of them has a field that captions may stand in.
    """
    folder = name.rpartition("/")[0]
    captioned = False
    line = 0
    fields: dict[str, None] = {}
    for line, record in _records(root, name):
        where = f"{root / name}, line {line}"
        file_name = _field(record, "file_name")
        if file_name is _MISSING:
            raise ValueError(f"{where}: has no 'file_name', only {_listed(record)}")
        if not isinstance(file_name, str) or not file_name:
            raise ValueError(f"{where}: its 'file_name' is {file_name!r}, not the name of a file")
        wanted = (column,) if column else CAPTION_NAMES
        captioned = captioned or any(has_field(record, known) for known in wanted)
        if not captioned:
            fields |= dict.fromkeys(record)
        if "\\" in file_name and not os.path.lexists(root / folder / file_name):
            file_name = file_name.replace("\\", "/")  # written on Windows
        yield path_inside(folder, file_name, where), caption_value(record, column)
    if line and not captioned:
        wanted = repr(column) if column else " or ".join(map(repr, CAPTION_NAMES))
        raise Uncaptioned(
            f"{root / name}: no line has {wanted}, only {_listed(fields)}; name the one that "
            "holds captions in data.caption_column"
        )


def _listed(fields: Iterable[str]) -> str:
    return ", ".join(map(repr, itertools.islice(fields, 20))) or "nothing"


def _records(root: Path, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of a line, what it says), whatever the format."""
    path, line = root / name, 0
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
        if is_lfs_pointer(head):
            raise ValueError(f"{path}: is a Git LFS pointer, run `git lfs pull`")
        if b"\0" in head:
            raise ValueError(f"{path}, line 1: is not UTF-8: it has zero bytes")
        with path.open(encoding="utf-8-sig", newline="") as file:
            if name.endswith(".csv"):
                for line, record in _csv_records(file, path):
                    yield line, record
            else:
                for line, text in enumerate(file, 1):
                    if text.strip():
                        yield line, _json_object(text, f"{path}, line {line}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {_line_of_damage(path)}: is not UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {error.strerror}") from error


def _csv_records(file: TextIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a table whose first line names its columns, between commas, semicolons or tabs.

    Where a name has a space before or behind it, spaces around values do not count either.
    """
    first = file.readline()
    file.seek(0)
    separators = [mark for mark in ",;\t" if "file_name" in _names(first, mark)]
    separator = separators[0] if separators else ","
    spaced = any(name != name.strip(" ") for name in first.rstrip("\r\n").split(separator))
    table = csv.DictReader(file, strict=True, delimiter=separator, skipinitialspace=spaced)
    table.fieldnames = [name.strip() for name in table.fieldnames or ()]
    names = [name.lower() for name in table.fieldnames if name]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise ValueError(f"{path}, line 1: has two columns called {twice!r}")
    for record in _each(table, path):
        if None in record:
            raise ValueError(
                f"{path}, line {table.line_num}: has more fields than line 1 has columns "
                f'({_listed(names)}); a text with {separator!r} in it has to stand in "quotes"'
            )
        if spaced:
            record = {name: value and value.strip() for name, value in record.items()}
        yield table.line_num, record


def _each(table: csv.DictReader, path: Path) -> Iterator[dict[str | Any, Any]]:
    """The rows of a table; one that is damaged is refused with the line where it begins."""
    while True:
        line = table.line_num + 1
        try:
            yield next(table)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}, line {line}: {error}") from error


def _names(line: str, separator: str) -> list[str]:
    return [name.strip(' \r\n"').lower() for name in line.lstrip("\ufeff").split(separator)]


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: is no JSON object")
    return record


def _line_of_damage(path: Path) -> int:
    """Number of the first line that is not UTF-8; text files are decoded in larger pieces."""
    with path.open("rb") as file:
        for line, text in enumerate(file, 1):
            try:
                text.decode()
            except UnicodeDecodeError:
                return line
    return 0


def path_inside(folder: str, file_name: str, where: str) -> str:
    """`file_name`, relative to `folder`, as a path relative to the root; it may not leave that."""
    parts = folder.split("/") if folder else []
    for part in file_name.split("/"):
        if part == "..":
            if not parts:
                raise ValueError(f"{where}: {file_name!r} is outside of the folder")
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    path = "/".join(parts)
    if file_name.startswith("/"):
        raise ValueError(f"{where}: {file_name!r} is not relative to the file it stands in")
    if "\0" in path or path != path.encode("utf-8", "replace").decode():
        raise ValueError(f"{where}: {file_name!r} cannot be the name of a file")
    return path
