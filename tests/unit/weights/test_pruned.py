"""A model gets as many blocks as its weights have; the flavor says the rest."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
import weight_files as made

from torchtitan_flux.checkpoint.manifest import RunFacts
from torchtitan_flux.model import FLAVORS, FluxModelArgs
from torchtitan_flux.planning.command import model_args
from torchtitan_flux.startup.load_config import load_config, read_config
from torchtitan_flux.startup.model_args import resolve_model_args
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.key_maps import Layout, foreign_shapes, layout_entries
from torchtitan_flux.weights.pruned import with_blocks_of, with_blocks_of_run

TINY = FLAVORS["flux-tiny"]
PRUNED = replace(TINY, depth=1, depth_single_blocks=3)


def file_of(folder: Path, args: FluxModelArgs, layout: Layout = "bfl") -> Path:
    shapes = foreign_shapes(args, layout_entries(layout, args))
    return made.sparse(folder / "pruned.safetensors", shapes)


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_blocks_follow_the_weights(tmp_path, layout):
    path = file_of(tmp_path, PRUNED, layout)
    assert with_blocks_of(path, TINY) == PRUNED
    assert with_blocks_of(path, FLAVORS["flux-digits"]) == FLAVORS["flux-digits"], "other widths"
    assert with_blocks_of(tmp_path / "absent", TINY) == TINY
    path.write_bytes(b"no weights")
    assert with_blocks_of(path, TINY) == TINY, "why is said where it is opened"


def test_a_configuration_is_believed_before_the_shapes(tmp_path):
    """Two blocks that a file lacks are missing, where its config.json says four."""
    content = architecture.to_diffusers_config(replace(PRUNED, depth=4))
    (tmp_path / "config.json").write_text(json.dumps(content))
    shapes = foreign_shapes(PRUNED, layout_entries("diffusers", PRUNED))
    made.sparse(tmp_path / "diffusion_pytorch_model.safetensors", shapes)
    assert with_blocks_of(tmp_path, TINY).depth == 4


def test_a_run_keeps_its_blocks(tmp_path):
    assert with_blocks_of_run(tmp_path, TINY) is None
    facts = RunFacts(5, 8, 22, 14, 12, depth=1, depth_single_blocks=3)
    older = {n: x for n, x in asdict(facts).items() if "depth" not in n}
    assert RunFacts.from_state(asdict(facts)) == facts
    assert RunFacts.from_state(older).depth is None
    for step, state, expected in ((1, older, TINY), (2, asdict(facts), PRUNED)):
        (tmp_path / f"step-{step}").mkdir()
        manifest = {"format": 1, "step": step, "kind": "full", "facts": state, "created": 0}
        (tmp_path / f"step-{step}" / "manifest.json").write_text(
            json.dumps({**manifest, "files": {}})
        )
        assert with_blocks_of_run(tmp_path, TINY) == expected
    (tmp_path / "step-3").mkdir()  # not complete
    assert with_blocks_of_run(tmp_path, TINY) == PRUNED


def test_check_planner_and_drawing_agree(tmp_path):
    path = file_of(tmp_path, PRUNED)
    argv = ["--job.config_file", "train_configs/debug_model.toml", "--model.flavor", "flux-tiny",
            "--training.img_size", "64", "--job.dump_folder", str(tmp_path / "run")]  # fmt: skip
    begin = ["--checkpoint.enable", "--checkpoint.initial_load_path", str(path)]
    config = load_config([*argv, *begin])
    assert resolve_model_args(config) == PRUNED
    assert model_args(config) == PRUNED
    assert resolve_model_args(load_config(argv)) == TINY
    assert resolve_model_args(load_config(argv, training=False), str(path)) == PRUNED
    saved = made.save_checkpoint(
        tmp_path / "run" / "checkpoint" / "step-7", made.ARGS, {"x": torch.ones(2)}
    )
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["facts"] |= {"depth": 1, "depth_single_blocks": 3}
    (saved / "manifest.json").write_text(json.dumps(manifest))
    own = load_config([*argv, "--checkpoint.no-enable"])
    assert resolve_model_args(own) == TINY, "a run that loads nothing is not bound by another"
    assert resolve_model_args(own, training=False) == PRUNED, "drawn from what was trained there"
    assert resolve_model_args(load_config([*argv, "--checkpoint.enable"])) == PRUNED

    dev = replace(FLAVORS["flux-dev"], depth=1, depth_single_blocks=2)
    path = file_of(tmp_path, dev)
    planned = read_config([*argv[:2], "--model.flavor", "flux-dev", *begin])
    assert model_args(planned) == dev
