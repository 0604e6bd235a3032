"""The examples run, and what they show happens."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="not started from a checkout")
def test_points_come_near_their_target(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "points.png"
    arguments = ["--steps", "100", "--sampling-steps", "8", "--picture", str(picture)]
    before, after = load("point_sets").main(arguments)
    assert after < 0.7 * before
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(shape in printed for shape in ("ring", "spiral", "eight"))
