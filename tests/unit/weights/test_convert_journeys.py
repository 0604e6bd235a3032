"""The commands of docs/checkpoints.md, read from there and run as they stand."""

import shutil
from dataclasses import replace
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
import weight_files as made
from documents import commands

from torchtitan_flux.model import FLAVORS
from torchtitan_flux.weights import compare, convert_command
from torchtitan_flux.weights.convert_autoencoder import open_autoencoder
from torchtitan_flux.weights.open import open_weights

ROOT = Path(__file__).resolve().parents[3]
PLAIN = replace(FLAVORS["flux-tiny"], depth=1, depth_single_blocks=1)
GUIDED = replace(PLAIN, guidance_embed=True)
SCRIPTS = {"convert_checkpoint": convert_command.main, "compare_checkpoints": compare.main}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the document takes for granted, small."""
    folder = tmp_path_factory.mktemp("journeys")
    plain, guided = made.state_dict(PLAIN), made.state_dict(GUIDED)
    made.save_checkpoint(folder / "outputs" / "checkpoint" / "step-1000", PLAIN, plain)
    (folder / "outputs" / "config.toml").write_text('[model]\nflavor = "flux-tiny"\n')
    for args, states, name in ((GUIDED, guided, "dev"), (PLAIN, plain, "schnell")):
        made.bfl_file(folder / f"flux1-{name}.safetensors", states, args)
    made.pipeline(folder / "FLUX.1-dev", GUIDED)
    shutil.copy(made.TINY / "ae.safetensors", folder / "ae.safetensors")
    made.torchtitan_checkpoint(folder / "torchtitan-outputs/checkpoint/step-500", plain, PLAIN)
    return folder


def test_every_command_of_the_document(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    # depth 1 + 1 instead of the flavors' own: these are what `--flavor` and the run's file name
    for flavor in ("flux-schnell", "flux-tiny"):
        monkeypatch.setitem(FLAVORS, flavor, PLAIN)
    ran = []
    for command in commands("docs/checkpoints.md"):
        python, script, *arguments = command.words
        assert python == "python"
        assert (ROOT / script).is_file()
        main = SCRIPTS[Path(script).stem]
        if main is compare.main:
            with pytest.raises(SystemExit) as left:
                main(arguments)
            assert left.value.code == 0, capsys.readouterr()
        else:
            main(arguments)
            ran.append((arguments[0], arguments[1], arguments[arguments.index("--to") + 1]))
    assert {to for _, _, to in ran} == {"diffusers", "pipeline", "comfyui", "bfl", "dcp"}
    for source, target, to in ran:
        if source in ("ae.safetensors", "vae"):
            open_autoencoder(Path(target))
            assert Path(target).is_dir() == (to == "diffusers")
            continue
        made_here = open_weights(target)
        assert made_here.format == ("diffusers" if to == "pipeline" else to)
        name = "single_blocks.0.linear1_by_head.weight"
        expected = made.state_dict(made_here.args)[name].to(made_here.dtypes[name])
        if "guid" not in target:  # of these, one has the weights of the other architecture
            assert torch.equal(made_here.read(name), expected), target
    assert open_weights("flux1-unguided.safetensors").args == PLAIN
    assert open_weights("flux1-guided.safetensors").args == GUIDED
