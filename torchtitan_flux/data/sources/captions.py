"""Captions that stand beside pictures: in texts, in JSON records, in metadata files."""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torchtitan_flux.data.sources import listing
from torchtitan_flux.data.sources.source import CAPTION_COLUMN
from torchtitan_flux.formatting import listed

CAPTION_NAMES = ("text", "caption", "captions", "prompt")
"""Columns and keys that are taken for captions when none is named: the first that holds any."""

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
"""Files that caption the pictures of their folder, as Hugging Face's `imagefolder` has them."""

NO_CAPTION = "has no caption"
"""Why an item without any caption is not read, unless `data.default_caption` stands in for it."""

_LINE_END = re.compile("\r\n|\n|\r")  # str.splitlines would also split at U+2028, VT, …
_BOM = b"\xef\xbb\xbf"

Captions = tuple[tuple[str, ...], str]
"""Captions and "", or none and why."""


def captions_of(value: object, by_line: bool) -> Captions:
    """Captions from a text or a list of texts; with `by_line`, each line is one of its own."""
    texts = value if isinstance(value, list | tuple) else [value]
    texts = [text for text in texts if isinstance(text, str)]
    if by_line:
        texts = [line for text in texts for line in _LINE_END.split(text)]
    captions = tuple(text.strip() for text in texts if text.strip())
    return captions, "" if captions else NO_CAPTION


def first_of(found: Iterable[Captions]) -> Captions:
    """The first that says anything; else why none does."""
    reason = NO_CAPTION
    for captions, why in found:
        if captions:
            return captions, ""
        reason = why if reason == NO_CAPTION else reason
    return (), reason


def captions_of_file(data: bytes, suffix: str, column: str, by_line: bool) -> Captions:
    """Captions of a text file, or of a .json that holds one record with the field `column`."""
    if listing.is_lfs_pointer(data):
        return (), f"its {suffix} {listing.LFS_POINTER}"
    try:
        if suffix != ".json":
            return captions_of(_decoded(data.removeprefix(_BOM)), by_line)
        record = _record(data)
        if column and _field(record, column) is None:
            raise ValueError(f"has no {column!r}")
    except ValueError as error:
        return (), f"its {suffix} {error}"
    return captions_of(caption_value(record, column), by_line)


def _decoded(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8") from error
    if "\0" in text:  # UTF-16 of plain letters is valid UTF-8, with a zero beside each of them
        raise ValueError("is not UTF-8: it has zero bytes")
    return text


def _record(text: str | bytes) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("is no JSON") from error
    if not isinstance(record, dict):
        raise ValueError("is no JSON object")
    return record


def caption_value(record: Mapping[str, Any], column: str) -> Any:
    """What a record says in a field: the one named, else the first of CAPTION_NAMES that says any.

    Names of fields are found in any case where the exact one is not there.
    """
    values = (_field(record, name) for name in ((column,) if column else CAPTION_NAMES))
    return next(filter(None, values), None)


def _field(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field; None where there is none."""
    same = (key for key in record if key and key.lower() == name.lower())
    return record.get(name if name in record else next(same, name))


def metadata_captions(root: Path, name: str, column: str) -> Iterator[tuple[str, Any]]:
    """Rows of the metadata file `name`: (path of a picture, what stands for captions).

    Both paths are relative to `root`. ValueError where a line says something else, or, after all
    rows, where `column` is named and none has it.
    """
    folder, path, number = os.path.dirname(name), root / name, 0
    columns: dict[str, None] = {}

    def lines() -> Iterator[str]:
        nonlocal number
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and listing.is_lfs_pointer(line):
                    raise ValueError(listing.LFS_POINTER)
                yield _decoded(line.removeprefix(_BOM) if number == 1 else line)

    csv_file = name.endswith(".csv")
    try:
        rows = _csv_rows(lines()) if csv_file else (_record(li) for li in lines() if li.strip())
        for record in rows:
            columns |= dict.fromkeys(record)
            file_name = _field(record, "file_name")
            if not isinstance(file_name, str) or not file_name:
                raise ValueError(f"no name stands in 'file_name': {record!r:.200}")
            yield _path_inside(root, folder, file_name), caption_value(record, column)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    if columns and column and column.lower() not in map(str.lower, columns):
        found = listed(map(repr, columns), 20)
        raise ValueError(f"{path}: no line has {column!r} ({CAPTION_COLUMN}), only {found}")


def _csv_rows(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Rows of a table whose first line names its columns, between commas, semicolons or tabs."""
    header = next(lines, "")
    separator = max(",;\t", key=header.count)
    style = {"strict": True, "delimiter": separator, "skipinitialspace": True}
    names = [name.strip() for name in next(csv.reader([header], **style), [])]
    for row in csv.DictReader(lines, names, **style):
        if None in row:
            columns = listed(map(repr, names))
            quoted = f'put texts with {separator!r} in "quotes"'
            raise ValueError(f"has more fields than line 1 has columns ({columns}); {quoted}")
        yield {name: value and value.strip() for name, value in row.items()}


def _path_inside(root: Path, folder: str, file_name: str) -> str:
    """`file_name` in a file of `folder`, relative to the root, which it may not leave."""
    if "\0" in file_name or not listing.is_unicode(file_name):
        raise ValueError(f"{file_name!r} cannot be the name of a file")
    path = os.path.normpath(os.path.join(folder, listing.as_spelled(root / folder, file_name)))
    if path.startswith("/") or path.split("/")[0] == "..":
        raise ValueError(f"{file_name!r} is outside of the folder")
    return path
