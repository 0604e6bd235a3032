"""A configuration as TOML: the resolved file, and all keys described, for `--help` and the docs."""

import textwrap
from itertools import groupby

from torchtitan_flux.config.schema import get, keys_of
from torchtitan_flux.config.values import toml_text, type_name

ABOUT = """\
Usage: ./run_train.sh [--check | --print-config] [--section.key value …]

  --check                   check the configuration, start nothing
  --print-config            print the configuration as resolved, start nothing
  --help                    this text

  CONFIG_FILE               environment: TOML file (default train_configs/flux_digits.toml); also
                            --job.config_file FILE
  NGPU, LOG_RANK, NNODES, NODE_RANK, RDZV_ENDPOINT, GRACE
                            environment: ranks, and what is shown of them; see the head of
                            run_train.sh

Every key below may stand in the TOML file and on the command line, which outranks it. Switches are
--section.key and --section.no-key; lists are several values, or one cut at its commas,
except those before a space.
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
