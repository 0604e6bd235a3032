"""SIGKILL at random moments: scripts/kill_test.py, in three sizes."""

import random
import re
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/kill_test.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize(("kills", "inside", "seed"), [
    pytest.param(3, 1, 3, id="3 kills"),
    pytest.param(10, 3, 10, id="10 kills", marks=pytest.mark.slow),
    pytest.param(30, 8, None, id="30 kills", marks=pytest.mark.long),
])  # fmt: skip
def test_killed_and_started_again_it_ends_as_if_nothing_had_happened(tmp_path, kills, inside, seed):
    seed = random.randrange(2**31) if seed is None else seed  # printed, to repeat a failure
    figures = runpy.run_path(str(SCRIPT))["kill_test"](tmp_path, kills, inside, seed)
    print(figures)
    survived, cut = map(int, re.findall(r"(\d+) (?:kills|cut)", figures))
    assert survived >= kills
    assert cut >= inside
