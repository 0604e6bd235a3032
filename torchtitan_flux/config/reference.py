"""All keys, described: for `--help`, and as docs/configuration.md."""

import textwrap
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from torchtitan_flux.config.schema import Key
from torchtitan_flux.config.values import allowed, toml_text

WIDTH = 100

ABOUT = """\
Usage: {command} [--check | --print-config] [--section.key value …]

  --check                   check the configuration, start nothing
  --print-config            print the configuration as resolved, start nothing
  --help                    this text

  CONFIG_FILE               environment: TOML file (default {config_file}); also
                            --job.config_file FILE
  NGPU, LOG_RANK, NNODES, NODE_RANK, RDZV_ENDPOINT, GRACE
                            environment: ranks, and what is shown of them; see the head of
                            run_train.sh

Every key below may stand in the TOML file and on the command line, which outranks it. Switches are
--section.key and --section.no-key; lists are several values, or one cut at its commas,
except those before a space.
"""


def help_text(keys: Iterable[Key], command: str, config_file: str) -> str:
    """What `--help` prints: usage, then each key with its default, type and meaning."""
    lines = [ABOUT.format(command=command, config_file=config_file)]
    for section, of_section in _by_section(keys):
        lines += [f"[{section}]"]
        for key in of_section:
            lines += _wrapped(f"--{key.name}  ({_default(key)}; {_type(key)})", 2)
            lines += _wrapped(key.meaning, 6)
        lines.append("")
    return "\n".join(lines)


def reference_text(keys: Iterable[Key]) -> str:
    """The tables of docs/configuration.md, a section of the TOML each."""
    lines: list[str] = []
    for section, of_section in _by_section(keys):
        lines += [
            "",
            f"## [{section}]",
            "",
            "| key | default | type | meaning |",
            "|---|---|---|---|",
        ]
        for key in of_section:
            name = key.name.rpartition(".")[2]
            cells = (f"`{name}`", f"`{_default(key)}`", _type(key), key.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).lstrip("\n") + "\n"


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * 6)


def _by_section(keys: Iterable[Key]) -> Iterator[tuple[str, Iterator[Key]]]:
    return groupby(keys, lambda key: key.section)


def _default(key: Key) -> str:
    return "unset" if key.default is None else toml_text(key.default)


def _type(key: Key) -> str:
    text: Any = allowed(key.annotation)
    return text.replace("a string in quotes", "a string")
