"""A configuration as TOML: the resolved file, and all keys described, for `--help` and the docs."""

import textwrap
from itertools import groupby

from torchtitan_flux.config.schema import get, keys_of
from torchtitan_flux.config.values import toml_text, type_name

ABOUT = """\
# ./run_train.sh [--check | --print-config] [--section.key value …]
# --check only checks the configuration, --print-config prints it as resolved; the environment
# variables stand at the head of run_train.sh. Every key below may stand in CONFIG_FILE and on the
# command line, which outranks it. Switches are --section.key and --section.no-key; lists are
# several values, or one cut at its commas, except those before a space.
"""


def as_toml(config: object, described: bool = False) -> str:
    """Every key with its value; read again as configuration file it gives an equal configuration.

    Keys that are unset and unset by default are left out: TOML has no word for it.

    Args:
        config: any configuration of dataclasses.
        described: whether meaning and type of each key stand above it.
    """
    lines = []
    for section, keys in groupby(keys_of(type(config)), lambda key: key.section):
        lines += ["", f"[{section}]"]
        for key in keys:
            value = get(config, key.name)
            line = f"{key.name.rpartition('.')[2]} = {toml_text(value)}"
            unset = value is None and key.default is None
            if described:
                text = f"# {key.meaning} ({type_name(key.annotation)})"
                lines += textwrap.wrap(text, 100, subsequent_indent="# ")
            if described or not unset:
                lines.append(f"# {line}" if unset else line)
    return "\n".join(lines) + "\n"
