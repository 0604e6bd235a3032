"""The licence of what weights come from stays with them, through runs and through guidance."""

import json
import shutil
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import made_weights as made
import pytest
from torch import Tensor

from torchtitan_flux.model import FLAVORS, FluxModelArgs
from torchtitan_flux.weights.model_card import travelling_files
from torchtitan_flux.weights.open import Guidance, open_weights

DEV, SCHNELL = made.GUIDED, made.ARGS
NON_COMMERCIAL = "license_name: flux-1-dev-non-commercial-license"


@pytest.fixture(scope="module")
def states() -> dict[FluxModelArgs, dict[str, Tensor]]:
    return {args: made.state_dict(args) for args in (DEV, SCHNELL)}


@pytest.fixture(autouse=True)
def small_dev(monkeypatch):
    monkeypatch.setitem(FLAVORS, "flux-dev", DEV)


def run(folder: Path, args, states, base: Path | None, guidance: str = "match") -> Path:
    """A checkpoint of a run that began with `base`."""
    step = made.make(folder, "dcp", args, states[args])
    config = {"model": {"flavor": "flux-dev"}, "checkpoint": {"guidance_weights": guidance}}
    config["checkpoint"] |= {"initial_load_path": str(base or "")}
    (folder / "config.json").write_text(json.dumps(config))
    return step


def told(
    path: Path, args: FluxModelArgs | None = None, guidance: Guidance = "match"
) -> dict[str, str]:
    weights = open_weights(path, args, guidance)
    files = travelling_files(weights, "bfl", Path("out.safetensors"), None)
    return {name: content.decode() for name, content in files.items()}


def test_guidance_dropped_or_initialised(tmp_path, states):
    dev = made.make(tmp_path / "dev", "bfl", DEV, states[DEV])
    schnell = made.make(tmp_path / "schnell", "bfl", SCHNELL, states[SCHNELL])
    assert NON_COMMERCIAL in told(dev)["README.md"]
    assert NON_COMMERCIAL in told(dev, guidance="drop")["README.md"]
    assert "license" not in told(schnell)["README.md"]
    card = told(schnell, guidance="initialize")["README.md"]
    assert "license" not in card
    again = made.make(tmp_path / "again", "bfl", DEV, states[DEV])
    again.with_name(f"{again.stem}.README.md").write_text(card)
    assert "license" not in told(again)["README.md"], "it was known when that card was written"


@pytest.mark.parametrize("there", [True, False], ids=["base there", "base gone"])
def test_a_run_has_the_licence_of_the_weights_it_began_with(tmp_path, states, there):
    dev = made.make(tmp_path / "dev", "bfl", DEV, states[DEV])
    schnell = made.make(tmp_path / "schnell", "bfl", SCHNELL, states[SCHNELL])
    steps = [
        run(tmp_path / "a", DEV, states, dev),
        run(tmp_path / "b", SCHNELL, states, dev, "drop"),
        run(tmp_path / "c", DEV, states, schnell, "initialize"),
        run(tmp_path / "d", DEV, states, None),
    ]
    if not there:
        shutil.rmtree(dev.parent)
        shutil.rmtree(schnell.parent)
    architectures = (DEV, SCHNELL, DEV, DEV)
    cards = [told(*one)["README.md"] for one in zip(steps, architectures, strict=True)]
    assert [NON_COMMERCIAL in card for card in cards] == [True, True, False, False]


def test_licence_files_of_what_a_run_began_with(tmp_path, states):
    """Also through a run before it; the base's card is not taken for the run's."""
    base = made.make(tmp_path / "base", "diffusers", DEV, states[DEV])
    (base / "LICENSE.md").write_text("do no harm")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: kind\n---\n# Theirs\n")
    first = run(tmp_path / "first", DEV, states, base)
    second = run(tmp_path / "second", SCHNELL, states, first, "drop")
    again = run(tmp_path / "again", SCHNELL, states, None)
    config = tmp_path / "again" / "config.json"  # names itself: it went on from its own checkpoint
    config.write_text(config.read_text().replace('""', json.dumps(str(again))))
    for step, args in ((first, DEV), (second, SCHNELL)):
        files = told(step, args)
        assert files.keys() == {"LICENSE.md", "README.md"}
        assert files["LICENSE.md"] == "do no harm"
        assert "license_name: kind" in files["README.md"]
        assert "With torchtitan-flux: 7 steps" in files["README.md"]
    assert told(again, SCHNELL).keys() == {"README.md"}
