"""A model with fewer blocks than its flavor: trained, continued without its file, drawn."""

from dataclasses import replace
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from helpers import nonzero_model
from ranks import run_ranks
from tiny_run import arguments, trained
from twins import whole
from weight_files import bfl_file

from torchtitan_flux.inference.open_run import load_model, open_run
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.startup.load_config import load_config
from torchtitan_flux.weights.open import open_weights

PRUNED = replace(FLAVORS["flux-tiny"], depth=1, depth_single_blocks=3)
NOTICE = "1 double and 3 single blocks, model.flavor = 'flux-tiny' 2 and 2"


def drawn_with(argv: list[str], places: list[str | None]) -> list[dict[str, torch.Tensor]]:
    """The weights that sessions draw with: of files, and of the run itself."""
    config = load_config(argv, training=False)
    models = [load_model(open_run(config, weights))[0] for weights in places]
    return [{n: whole(p.detach()).clone() for n, p in m.named_parameters()} for m in models]


def test_a_pruned_model_is_trained_continued_and_drawn(tmp_path):
    values = nonzero_model(PRUNED, seed=3).state_dict()
    path = bfl_file(tmp_path / "flux1-pruned.safetensors", values, PRUNED)
    begin = ("--checkpoint.initial_load_path", str(path))
    run = tmp_path / "run"
    first = trained(1, arguments(run, 8, "--training.steps", "1", *begin))
    assert NOTICE in first.log
    assert first.weights.keys() == values.keys()

    path = path.rename(tmp_path / "elsewhere.safetensors")
    second = trained(1, arguments(run, 8, "--training.steps", "2"))
    assert list(second.losses) == [2], "resumed"
    assert NOTICE in second.log
    assert second.weights.keys() == values.keys()

    ((file, own),) = run_ranks(1, drawn_with, arguments(run, 8), [str(path), None])
    for found, expected in ((file, values), (own, second.weights)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    found = open_weights(Path(run) / "checkpoint" / "step-2", alone=True)
    one, other = (replace(x, context_in_dim=1, vec_in_dim=1) for x in (found.args, PRUNED))
    assert one == other
