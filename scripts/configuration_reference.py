"""Write docs/configuration.md, every key of the configuration.

    python scripts/configuration_reference.py

It comes from the dataclasses in torchtitan_flux/config/job_config.py and torchtitan, and from
torchtitan_flux/config/meanings.py; a test keeps it current.
"""

from pathlib import Path

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.reference import as_toml

PATH = Path(__file__).parent.parent / "docs" / "configuration.md"

HEAD = """\
# Configuration

Every key, by section of the TOML file, with its default; `./run_train.sh --help` prints the same.
Written by `python scripts/configuration_reference.py`; do not edit.

- A file holds what differs from the defaults below: `CONFIG_FILE=my.toml ./run_train.sh`.
- The command line outranks it: `--section.key value`, `--section.key` and `--section.no-key` for
  switches, dashes and underscores alike; a list is several values, or one that is cut at its
  commas, except those before a space. A key that is given twice counts as given last.
- `"None"` unsets a key where that is among its types.
- Relative paths are looked up from the current folder, then from the repository.
- `--check` checks a configuration and starts nothing; `--print-config` prints it as resolved.
- A run leaves `config.toml` in its dump folder: the configuration as resolved, seed included.
- What cannot run is refused in one report before anything is built: [errors](errors.md).
- Files that were written for torchtitan's own FLUX (0.2.1, 0.2.2) run as they are; keys that do
  nothing here are named at the start of the run, and say so below.

"""


def text() -> str:
    """The whole document."""
    return f"{HEAD}```toml\n{as_toml(FluxJobConfig(), described=True).lstrip()}```\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
    print(PATH)
