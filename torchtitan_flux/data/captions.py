"""Captions that stand beside pictures: in texts, in JSON records, in metadata files."""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torchtitan_flux.data.foreign import is_lfs_pointer
from torchtitan_flux.data.sources import UnreadableItem

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
        return captions_or_reason(data.decode("utf-8-sig"), by_line)
    except UnicodeDecodeError:
        return (), f"its {suffix} is not UTF-8"


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


def metadata_captions(root: Path, name: str, column: str) -> Iterator[tuple[str, Any]]:
    """Rows of a metadata file: (path of a picture relative to `root`, what stands for captions).

    Args:
        root: folder of the data.
        name: path of the file relative to it, metadata.jsonl or metadata.csv.
        column: where captions stand; "" for the first of CAPTION_NAMES.

    Raises:
        ValueError: the file, or a line of it, says something else.
    """
    folder = name.rpartition("/")[0]
    captioned = False
    line = 0
    for line, record in _records(root, name):
        file_name = record.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            raise ValueError(f"{root / name}, line {line}: has no 'file_name'")
        wanted = (column,) if column else CAPTION_NAMES
        captioned = captioned or any(has_field(record, known) for known in wanted)
        picture = path_inside(folder, file_name, f"{root / name}, line {line}")
        yield picture, caption_value(record, column)
    if line and not captioned:
        wanted = repr(column) if column else " or ".join(map(repr, CAPTION_NAMES))
        raise ValueError(
            f"{root / name}: no line has {wanted}; name the one that holds captions in "
            "data.caption_column"
        )


def _records(root: Path, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of a line, what it says), whatever the format."""
    path, line = root / name, 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if name.endswith(".csv"):
                table = csv.DictReader(file, strict=True)
                for record in table:
                    line = table.line_num
                    yield line, record
            else:
                for line, text in enumerate(file, 1):
                    if text.strip():
                        yield line, _json_object(text, f"{path}, line {line}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {_line_of_damage(path)}: is not UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{path}, line {line + 1}: {error}") from error


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
