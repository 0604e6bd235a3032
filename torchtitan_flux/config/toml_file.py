"""A TOML file with the line of every key."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli


@dataclass(frozen=True)
class TomlFile:
    """What a configuration file says.

    Attributes:
        path: the file, as it is to be named in messages.
        values: nested tables.
        lines: "section.key" and "section" -> the line, from 1, where it is given.
    """

    path: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """ "FILE:LINE" of a key or section; the file alone where the line is not known.

        A key inside of an inline table has the line of that table, a section that is only named
        by its keys that of the first.
        """
        name = key
        while name and name not in self.lines:
            name = name.rpartition(".")[0]
        below = (line for other, line in self.lines.items() if other.startswith(f"{key}."))
        line = self.lines.get(name) or next(below, None)
        file = Path(self.path).name
        return f"{file}:{line}" if line else file


def read_toml(path: Path, name: str) -> TomlFile:
    """Read a configuration file.

    Args:
        path: where it lies.
        name: what messages call it.

    Raises:
        ValueError: it cannot be read or is not TOML; the line is named.
    """
    key = f"job.config_file = {name!r}"
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{key} is not text in UTF-8 ({error.reason}); is it a TOML file?"
        ) from None
    except OSError as error:
        raise ValueError(f"{key} cannot be read: {error.strerror}") from None
    try:
        values = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise ValueError(f"{key} is not valid TOML: {error}") from None
    return TomlFile(name, values, dict(_lines(text)))


_KEY_PART = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|\'([^\']*)\'|([\w-]+))\s*')
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)+")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'', re.DOTALL
)


def _lines(text: str) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of each table and key of a valid document."""
    at, table = 0, ""
    while True:
        if blank := _BLANK.match(text, at):
            at = blank.end()
        if at >= len(text):
            return
        line = text.count("\n", 0, at) + 1
        if text[at] == "[":
            name, at = _name(text, at + text.startswith("[[", at) + 1)
            table = name
            yield name, line
            at = _end_of_line(text, at)
        else:
            name, at = _name(text, at)
            yield f"{table}.{name}" if table else name, line
            at = _end_of_value(text, at + 1)


def _name(text: str, at: int) -> tuple[str, int]:
    """A dotted key, and where it ends."""
    parts = []
    while match := _KEY_PART.match(text, at):
        parts.append(next(group for group in match.groups() if group is not None))
        at = match.end()
        if text[at : at + 1] != ".":
            break
        at += 1
    return ".".join(parts), at


def _end_of_line(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end + 1


def _end_of_value(text: str, at: int) -> int:
    """Where the line ends on which a value does, brackets and strings being closed."""
    depth = 0
    while at < len(text):
        c = text[at]
        if string := _STRING.match(text, at):
            at = string.end()
            continue
        if c == "#":
            at = _end_of_line(text, at) - 1
            if depth == 0:
                return at + 1
        elif c == "\n" and depth == 0:
            return at + 1
        depth += (c in "[{") - (c in "]}")
        at += 1
    return at
