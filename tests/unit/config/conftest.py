"""A wrong input's command line, in a folder of its own."""

from contextlib import ExitStack

import pytest
from unit.config.refusals import situation


@pytest.fixture
def arguments(tmp_path):
    """What is given -> the command line that says it, with `tmp_path` as current folder."""
    with ExitStack() as stack:
        yield lambda given: stack.enter_context(situation(given, tmp_path))
