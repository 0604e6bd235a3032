"""A wrong input's command line, in a folder of its own."""

from contextlib import ExitStack

import pytest
from unit.config.refusals import Refusal, situation


@pytest.fixture
def arguments(tmp_path):
    """Refusal -> the command line that it is refused by, with `tmp_path` as current folder."""
    with ExitStack() as stack:

        def prepare(case: Refusal) -> list[str]:
            return stack.enter_context(situation(case, tmp_path))

        yield prepare
