"""A configuration that cannot run: one exception, one report."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A configuration that cannot run; the message lists everything that is wrong."""

    def __init__(self, found: list[str]):
        super().__init__("\n".join(f"  - {line}" for line in found))
        self.found = found


@contextmanager
def exit_on_config_error() -> Iterator[None]:
    """A wrong configuration ends the process: one report, status 2, no traceback."""
    try:
        yield
    except ConfigError as error:
        print(f"The configuration cannot run:\n{error}", file=sys.stderr)
        sys.exit(2)
