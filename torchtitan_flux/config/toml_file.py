"""A TOML file with the line of every key."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli

from torchtitan_flux.config.problems import ConfigError, Problem


@dataclass(frozen=True)
class TomlFile:
    """What a configuration file says.

    Attributes:
        path: the file, as messages name it.
        values: nested tables.
        lines: "section.key" and "section" -> the line, from 1, where it is given.
    """

    path: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """ "FILE:LINE" of a key or section, or of what is around or below; else the file alone."""
        name = key
        while name and name not in self.lines:
            name = name.rpartition(".")[0]
        below = (line for other, line in self.lines.items() if other.startswith(f"{key}."))
        line = self.lines.get(name) or next(below, None)
        file = Path(self.path).name
        return f"{file}:{line}" if line else file


def read_toml(path: Path) -> TomlFile:
    """Read a configuration file.

    Raises:
        ConfigError: it cannot be read or is not TOML; the line is named.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        return TomlFile(str(path), tomli.loads(text), _lines(text))
    except UnicodeDecodeError as error:
        reason = f"is not text in UTF-8 ({error.reason}); is it a TOML file?"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except tomli.TOMLDecodeError as error:
        reason = f"is not valid TOML: {error}"
    raise ConfigError([Problem("job.config_file", f"{str(path)!r} {reason}")])


_NAME = r"""[\w."' -]+?"""
_TABLE_OR_KEY = re.compile(rf"\s*(?:\[\[?(?P<table>{_NAME})\]\]?\s*(?:#.*)?$|(?P<key>{_NAME})\s*=)")


def _lines(text: str) -> dict[str, int]:
    """Dotted name of each table and key -> the first line that looks like it."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        match = _TABLE_OR_KEY.match(line)
        if match is None:
            continue
        name = re.sub(r"[\s\"']", "", match["table"] or match["key"])
        if match["table"]:
            table = f"{name}."
        else:
            name = table + name
        lines.setdefault(name, number)
    return lines
