"""SIGKILL at random moments: scripts/kill_test.py, in three sizes."""

import importlib.util
import random
import re
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize(
    ("kills", "inside", "seed"),
    [
        pytest.param(3, 1, 1, id="3 kills"),
        pytest.param(10, 3, 2, id="10 kills", marks=pytest.mark.slow),
        pytest.param(30, 8, random.randrange(2**31), id="30 kills", marks=pytest.mark.long),
    ],
)
def test_killed_and_started_again_it_ends_as_if_nothing_had_happened(tmp_path, kills, inside, seed):
    spec = importlib.util.spec_from_file_location("kill_test", REPO / "scripts/kill_test.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    figures = module.kill_test(tmp_path, kills, inside, seed)
    print(figures)
    survived, cut = map(int, re.findall(r"(\d+) (?:kills|cut)", figures))
    assert survived >= kills
    assert cut >= inside
