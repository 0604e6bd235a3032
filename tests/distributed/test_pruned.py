"""A model with fewer blocks than its flavor: trained, continued without its first weights, drawn."""

from dataclasses import replace
from pathlib import Path

import torchtitan_flux.engine  # noqa: F401  (before torchtitan)

import torch
from helpers import nonzero_model
from ranks import run_ranks
from tiny_run import arguments, train
from weight_files import bfl_file

from torchtitan_flux.checkpoint.weights import open_weights
from torchtitan_flux.config.manager import load_config
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.training.session import open_session

PRUNED = replace(FLAVORS["flux-tiny"], depth=1, depth_single_blocks=3)
SAID = "1 double and 3 single blocks, model.flavor = 'flux-tiny' 2 and 2"


def drawn(argv: list[str], weights: str | None) -> tuple[dict[str, torch.Tensor], int]:
    """The weights that a session draws with, and its number of single blocks."""
    session = open_session(load_config(argv, training=False), weights=weights)
    values = {n: p.full_tensor().clone() for n, p in session.model.named_parameters()}
    return values, session.args.depth_single_blocks


def test_a_pruned_model_is_trained_continued_and_drawn(tmp_path):
    values = nonzero_model(PRUNED, seed=3).state_dict()
    path = bfl_file(tmp_path / "flux1-pruned.safetensors", values, PRUNED)
    begin = ("--checkpoint.initial_load_path", str(path))
    run = tmp_path / "run"
    (first,) = run_ranks(1, train, arguments(run, 8, "--training.steps", "1", *begin))
    assert first.error == ""
    assert SAID in first.log
    assert first.weights.keys() == values.keys()

    ((told, singles),) = run_ranks(1, drawn, arguments(run, 8), str(path))
    assert singles == 3
    assert all(torch.equal(told[name], value) for name, value in values.items())

    path.unlink()
    more = arguments(run, 8, "--training.steps", "2")
    (second,) = run_ranks(1, train, more)
    assert second.error == ""
    assert list(second.losses) == [2], "it went on"
    assert SAID in second.log
    assert second.weights.keys() == values.keys()
    ((own, _),) = run_ranks(1, drawn, arguments(run, 8), None)
    assert all(torch.equal(own[name], value) for name, value in second.weights.items())

    found = open_weights(Path(run) / "checkpoint" / "step-2", alone=True)
    assert replace(found.args, context_in_dim=1, vec_in_dim=1) == replace(
        PRUNED, context_in_dim=1, vec_in_dim=1
    )
