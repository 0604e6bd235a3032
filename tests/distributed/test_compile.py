"""Compiled blocks and loss give what eager ones give, from few graphs, with each way of
recomputing."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
ALONE = {"none", "full", "full, offloaded", "op", "budget 0.5", "budget 0"}
"""Modes that treat all blocks alike."""


def run(which: str, folder: Path) -> dict[str, Any]:
    """compiled_blocks.py, without the shape checks that pytest puts into this process."""
    path = folder / "outcomes.pt"
    python_path = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "compiled_blocks.py"), str(path), which],
        env={**os.environ, "PYTHONPATH": python_path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return torch.load(path)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Any]:
    return run("aot_eager", tmp_path_factory.mktemp("compiled"))


def assert_equal(outcome: dict[str, Any], eager: dict[str, Any]) -> None:
    assert outcome["loss"] == pytest.approx(eager["loss"], rel=1e-5)
    assert outcome["grads"].keys() == eager["grads"].keys()
    for name, grad in eager["grads"].items():
        assert grad.abs().max() > 1e-6, f"{name} is not tested"
        assert (outcome["grads"][name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name


def assert_few_graphs(name: str, outcome: dict[str, Any]) -> None:
    """Two for the blocks and one for the loss; fully_shard makes other classes of those blocks
    that have no wrapper, which are graphs of their own where only some have one."""
    assert outcome["graphs"] == (3 if name in ALONE else 5), name


def test_compiled_is_eager_on_one_rank(outcomes):
    for name, outcome in outcomes["1 rank"].items():
        assert_equal(outcome, outcomes["eager"])
        assert_few_graphs(name, outcome)


def test_compiled_is_eager_on_four_ranks(outcomes):
    for name, outcome in outcomes["4 ranks"].items():
        assert_equal(outcome, outcomes["eager"])
        assert_few_graphs(name, outcome)


def test_recomputation_saves_memory_in_compiled_blocks_too(outcomes):
    saved = {name: outcome["saved"] for name, outcome in outcomes["1 rank"].items()}
    for least in ("full", "full, offloaded", "budget 0"):
        assert saved[least] < 0.15 * saved["none"], least
    assert saved["full"] < 0.4 * saved["op"] < 0.3 * saved["none"]
    assert saved["full"] < saved["every 2nd"] < 0.7 * saved["none"]
    assert saved["budget 0"] < 0.5 * saved["budget 0.5"] < 0.4 * saved["none"]


def test_a_size_needs_two_graphs_whatever_the_depth(outcomes):
    """19 double and 38 single blocks, ten sizes, training and evaluation; then all of it again."""
    first, again = outcomes["sizes"][:10], outcomes["sizes"][10:]
    assert first == [2 * (number + 1) for number in range(10)]
    assert again == [20] * 10


@pytest.mark.long
@pytest.mark.parametrize("which", ["aot_eager 4", "inductor"])
def test_every_mode_on_four_ranks_and_inductor(which, tmp_path):
    results = run(which, tmp_path)
    for ranks in ("1 rank", "4 ranks"):
        for name, outcome in results.get(ranks, {}).items():
            assert_equal(outcome, results["eager"])
            assert_few_graphs(name, outcome)
