"""All keys, described: for `--help`, and as docs/configuration.md."""

import textwrap
from collections.abc import Iterable
from itertools import groupby

from torchtitan_flux.config.schema import Key
from torchtitan_flux.config.values import toml_text, type_name

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
    for section, of_section in groupby(keys, lambda key: key.section):
        lines += [f"[{section}]"]
        for key in of_section:
            head = f"--{key.name}  ({_default(key)}; {type_name(key.annotation)})"
            for text, indent in ((head, "  "), (key.meaning, "      ")):
                lines += textwrap.wrap(text, 100, initial_indent=indent, subsequent_indent="      ")
        lines.append("")
    return "\n".join(lines)


def reference_text(keys: Iterable[Key]) -> str:
    """The tables of docs/configuration.md, a section of the TOML each."""
    parts = []
    for section, of_section in groupby(keys, lambda key: key.section):
        rows = ["| key | default | type | meaning |", "|---|---|---|---|"]
        for key in of_section:
            name, of_type = key.name.rpartition(".")[2], type_name(key.annotation)
            cells = (f"`{name}`", f"`{_default(key)}`", f"`{of_type}`", key.meaning)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join([f"## [{section}]", "", *rows]))
    return "\n\n".join(parts) + "\n"


def _default(key: Key) -> str:
    return "unset" if key.default is None else toml_text(key.default)
