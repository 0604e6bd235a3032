"""The configuration that a run left: every key beside its default."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.schema import keys_of
from torchtitan_flux.config.values import toml_text

UNKNOWN = object()
"""Default of a key that this version does not know."""


@dataclass(frozen=True)
class Setting:
    """One key.

    Attributes:
        key: "section.key".
        value: as the run had it.
        default: as torchtitan-flux has it today, or UNKNOWN.
        meaning: one or two sentences.
    """

    key: str
    value: Any
    default: Any
    meaning: str

    @property
    def differs(self) -> bool:
        return self.default is UNKNOWN or self.value != self.default

    @property
    def value_text(self) -> str:
        return _shown(self.value)

    @property
    def default_text(self) -> str:
        return "no such key today" if self.default is UNKNOWN else _shown(self.default)


def find_configuration(folder: Path) -> Path | None:
    """The resolved configuration in a dump folder: config.toml, or under the name it was given."""
    usual = [folder / "config.toml", folder / "config.json"]
    others = sorted(p for p in folder.glob("*.*") if p.suffix in (".toml", ".json"))
    for path in [*usual, *others]:
        if path.is_file() and "job" in (_read(path) or {}):
            return path
    return None


def read_settings(path: Path) -> list[Setting]:
    """Every key of a resolved configuration, in the order of the reference.

    Keys that are left out have their default; keys that are not known any more come last.
    """
    given = _flat(_read(path) or {})
    settings = [
        Setting(key.name, given.pop(key.name, key.default), key.default, key.meaning)
        for key in keys_of(FluxJobConfig)
        if key.name != "job.config_file"
    ]
    given.pop("job.config_file", None)
    return settings + [Setting(key, value, UNKNOWN, "") for key, value in given.items()]


def _shown(value: Any) -> str:
    return "unset" if value is None else toml_text(value)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomli.loads(text)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in table.items():
        found.update(
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return found
