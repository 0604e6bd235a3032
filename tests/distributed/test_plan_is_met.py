"""The planner's estimate beside the memory that real ranks take."""

import subprocess
import sys
from pathlib import Path

import pytest
from measured_step import ARGS, configured

from torchtitan_flux.planning.dry_run import Mesh
from torchtitan_flux.planning.estimate import estimate

SCRIPT = Path(__file__).resolve().parents[1] / "measured_step.py"


@pytest.mark.parametrize(
    ("ranks", "mode"),
    [
        pytest.param(1, "none", marks=pytest.mark.long),
        pytest.param(1, "full", marks=pytest.mark.long),
        pytest.param(2, "none", marks=pytest.mark.long),
        pytest.param(2, "full", marks=pytest.mark.slow),
    ],
)
def test_a_real_step_takes_what_was_planned(ranks, mode):
    found, _ = estimate(configured(mode), ARGS, Mesh(shard=ranks))
    ran = subprocess.run(
        [sys.executable, SCRIPT, str(ranks), mode], capture_output=True, text=True, check=True
    )
    measured = int(ran.stdout.splitlines()[-1])
    planned = found.peak - found.frozen.weights
    print(f"{ranks} ranks, {mode}: planned {planned / 2**20:.0f} MiB, "
          f"measured {measured / 2**20:.0f} MiB")  # fmt: skip
    assert abs(planned / measured - 1) < 0.15
