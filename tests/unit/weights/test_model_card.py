"""The licence of what weights come from stays with them, through runs and through guidance."""

import json
import shutil
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import made_weights as made
import pytest
import yaml
from torch import Tensor

from torchtitan_flux.checkpoint.manifest import Manifest
from torchtitan_flux.model import FLAVORS, FluxModelArgs
from torchtitan_flux.weights.convert import convert
from torchtitan_flux.weights.key_maps import foreign_shapes, layout_entries
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
    (folder / "config.json").write_text(json.dumps(config))
    return step


def told(
    path: Path, args: FluxModelArgs | None = None, guidance: Guidance = "match"
) -> dict[str, str]:
    weights = open_weights(path, args, guidance)
    files = companion_files(weights, "out", diffusers=False)
    return {name: content.decode() for name, content in files.items()}


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_licence_and_card_travel(tmp_path, states):
    root = tmp_path / "theirs"
    made.make(root / "transformer", "diffusers", SCHNELL, states[SCHNELL])
    (root / "model_index.json").write_text("{}")
    (root / "LICENSE.md").write_text("do no harm")
    (root / "README.md").write_text("---\nlicense: other\nlicense_name: kind\n---\n# Theirs\n")
    convert(root, tmp_path / "ours", "dcp")
    convert(tmp_path / "ours", tmp_path / "flux1-a.safetensors", "bfl")
    convert(tmp_path / "flux1-a.safetensors", tmp_path / "last", "diffusers")
    assert (tmp_path / "last" / "LICENSE.md").read_text() == "do no harm"
    assert "# Theirs" in (tmp_path / "ours" / "SOURCE_README.md").read_text()
    assert front_matter((tmp_path / "last" / "README.md").read_text()) == {
        "license": "other",
        "license_name": "kind",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "torchtitan_flux": {"source": "theirs (diffusers)"},
    }
    assert set(Manifest.read(tmp_path / "ours").files) >= {"README.md", "LICENSE.md"}


def test_a_card_says_how_the_run_trained(tmp_path, states):
    step = run(tmp_path, SCHNELL, states, None)
    config = {"model": {}, "training": {"dataset": "shapes"}, "optimizer": {"lr": 8e-4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = front_matter(told(step, SCHNELL)["README.md"])
    assert data["torchtitan_flux"] == {
        "source": "step-7 (dcp)",
        "steps": 7,
        "images_per_step": 8,
        "seed": 5,
        "training.dataset": "shapes",
        "optimizer.lr": 8e-4,
    }
    assert "license" not in data


@pytest.mark.parametrize(("flavor", "named"), [("flux-dev", True), ("flux-schnell", False)])
def test_derivatives_of_dev_name_its_licence(tmp_path, flavor, named):
    args = FLAVORS[flavor]
    shapes = foreign_shapes(args, layout_entries("bfl", args))
    card = told(made.sparse(tmp_path / "flux1-x.safetensors", shapes))["README.md"]
    assert (NON_COMMERCIAL in card) == named
    assert ("license: other" in card) == named


def test_guidance_dropped_or_initialised(small_dev, tmp_path, states):
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
def test_a_run_has_the_licence_of_the_weights_it_began_with(small_dev, tmp_path, states, there):
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


def test_licence_files_of_what_a_run_began_with(small_dev, tmp_path, states):
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
        assert front_matter(files["README.md"])["torchtitan_flux"]["steps"] == 7
    assert told(again, SCHNELL).keys() == {"README.md"}
