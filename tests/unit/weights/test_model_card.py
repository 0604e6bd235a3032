"""The licence of what weights come from stays with them, through runs and through guidance."""

import json
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import weight_files as made
import yaml
from torch import Tensor

from torchtitan_flux.checkpoint.manifest import Manifest
from torchtitan_flux.model import FLAVORS, FluxModelArgs
from torchtitan_flux.weights.convert import convert
from torchtitan_flux.weights.model_card import companion_files
from torchtitan_flux.weights.open import Guidance, open_weights

DEV, SCHNELL = made.GUIDED, made.ARGS
NON_COMMERCIAL = "license_name: flux-1-dev-non-commercial-license"


@pytest.fixture(scope="module")
def states() -> dict[FluxModelArgs, dict[str, Tensor]]:
    return {args: made.state_dict(args) for args in (DEV, SCHNELL)}


@pytest.fixture
def small_dev(monkeypatch):
    monkeypatch.setitem(FLAVORS, "flux-dev", DEV)


def run(folder: Path, args, states, base: Path | None, guidance: str = "match") -> Path:
    """A checkpoint of a run that began with `base`."""
    step = made.make(folder, "dcp", args, states[args])
    config = {"model": {"flavor": "flux-dev"}, "checkpoint": {"guidance_weights": guidance}}
    config["checkpoint"] |= {"initial_load_path": str(base or "")}
    config |= {"training": {"dataset": "shapes"}, "optimizer": {"lr": 8e-4}}
    (folder / "config.json").write_text(json.dumps(config))
    return step


def told(path: Path, args: FluxModelArgs | None = None, guidance: Guidance = "match"):
    files = companion_files(open_weights(path, args, guidance), "out")
    return {name: content.decode() for name, content in files.items()}


def test_licences_travel_and_a_card_says_how_the_run_trained(small_dev, tmp_path, states):
    root = tmp_path / "theirs"
    made.make(root / "transformer", "diffusers", DEV, states[DEV])
    (root / "model_index.json").write_text("{}")
    (root / "LICENSE.md").write_text("do no harm")
    (root / "README.md").write_text("---\nlicense: other\nlicense_name: kind\n---\n# Theirs\n")
    convert(root / "transformer", tmp_path / "ours", "dcp")
    assert set(Manifest.read(tmp_path / "ours").files) >= {"README.md", "LICENSE.md"}
    files = told(run(tmp_path / "run", SCHNELL, states, tmp_path / "ours", "drop"), SCHNELL)
    assert files.keys() == {"LICENSE.md", "README.md"}
    assert files["LICENSE.md"] == "do no harm"
    assert yaml.safe_load(files["README.md"].split("---")[1]) == {
        "license": "other",
        "license_name": "kind",
        "pipeline_tag": "text-to-image",
        "torchtitan_flux": {
            "source": "step-7 (dcp)",
            "steps": 7,
            "seed": 5,
            "training.dataset": "shapes",
            "optimizer.lr": 8e-4,
            "checkpoint.initial_load_path": str(tmp_path / "ours"),
        },
    }


def test_derivatives_of_dev_name_its_licence(small_dev, tmp_path, states):
    """Whatever a run or a conversion did about guidance, and where the base is gone."""
    dev = made.make(tmp_path / "dev", "bfl", DEV, states[DEV])
    schnell = made.make(tmp_path / "schnell", "bfl", SCHNELL, states[SCHNELL])
    gone = tmp_path / "gone"
    for named, step, args, guidance in (
        (True, dev, DEV, "match"),
        (True, dev, None, "drop"),
        (False, schnell, SCHNELL, "match"),
        (False, schnell, None, "initialize"),
        (True, run(tmp_path / "a", DEV, states, gone), DEV, "match"),
        (True, run(tmp_path / "b", SCHNELL, states, gone, "drop"), SCHNELL, "match"),
        (False, run(tmp_path / "c", DEV, states, gone, "initialize"), DEV, "match"),
        (False, run(tmp_path / "d", DEV, states, None), DEV, "match"),
    ):
        assert (NON_COMMERCIAL in told(step, args, guidance)["README.md"]) == named, step
