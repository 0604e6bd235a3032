"""FLUX weights of every format into a run on any mesh: the same model, or one clear refusal."""

import math
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
import torch.distributed as dist
from helpers import nonzero_model
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_run import arguments, refusal
from torch import Tensor
from twins import whole
from weight_files import (
    bfl_file,
    diffusers_folder,
    pipeline_root,
    scaled_float8,
    torchtitan_checkpoint,
)

from torchtitan_flux.model import FLAVORS, FluxModel
from torchtitan_flux.model.initial_values import canonical_name
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.parallel.parallelize import parallelize_flux
from torchtitan_flux.parallel.pipeline import pipeline_flux
from torchtitan_flux.shards import local
from torchtitan_flux.startup.load_config import load_config
from torchtitan_flux.training.trainer import FluxTrainer
from torchtitan_flux.weights.key_maps import from_layout, to_layout
from torchtitan_flux.weights.open import import_weights, open_weights

ARGS = FLAVORS["flux-tiny"]
GUIDED = replace(ARGS, guidance_embed=True)


@dataclass(frozen=True)
class Files:
    """The same weights, with guidance (as FLUX.1-dev) and without, as others keep them."""

    folder: Path
    values: dict[str, Tensor]
    root: Path
    single: Path
    bfl: Path
    comfyui: Path
    torchtitan: Path
    guided: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    folder = tmp_path_factory.mktemp("weights")
    values = nonzero_model(GUIDED, seed=11).state_dict()
    plain = {name: x for name, x in values.items() if not name.startswith("guidance_in.")}
    return Files(
        folder,
        values,
        pipeline_root(folder / "pipeline", plain, ARGS),
        diffusers_folder(folder / "single", plain, ARGS, shards=1),
        bfl_file(folder / "flux1-tiny.safetensors", plain, ARGS),
        bfl_file(folder / "comfyui.safetensors", plain, ARGS, prefix="model.diffusion_model."),
        torchtitan_checkpoint(folder / "torchtitan", plain, ARGS),
        diffusers_folder(folder / "guided", values, GUIDED),
    )


# ---- every mesh ------------------------------------------------------------------------------


def parallelism(replicate: int = 1, shard: int = 1, cp: int = 1, tp: int = 1, pp: int = 1):
    keys = {
        "data_parallel_replicate": replicate,
        "data_parallel_shard": shard,
        "context_parallel": cp,
        "tensor_parallel": tp,
        "pipeline_parallel": pp,
    }
    return [w for k, degree in keys.items() for w in (f"--parallelism.{k}_degree", str(degree))]


def imported(
    mesh: list[str], paths: list[Path], values: dict[str, Tensor]
) -> tuple[set[str], list[str]]:
    """Parameters of this rank's stages, and what is wrong after importing each path."""
    config = load_config(arguments(Path("unused"), 2, *mesh))
    dims = FluxParallelDims.of(config.parallelism, dist.get_world_size())
    with torch.device("meta"):
        model = FluxModel(ARGS)
    if dims.pp_enabled:
        device = torch.device("cpu")
        _, parts, *_ = pipeline_flux(model, dims, config, device, ARGS, parallelize_flux)
    else:
        parts = [parallelize_flux(model, dims, config)]
    for part in parts:
        part.to_empty(device="cpu")
    own = {canonical_name(name): p for part in parts for name, p in part.named_parameters()}
    wrong, first = [], {}
    for path in paths:
        for p in own.values():
            local(p.detach()).fill_(torch.nan)
        import_weights(own, open_weights(path, ARGS))
        if not first:
            first = {name: local(p).clone() for name, p in own.items()}
            wrong += [n for n, p in own.items() if not torch.equal(whole(p.detach()), values[n])]
        # gathering is slow, and what equals locally does so as a whole
        equal = {name: torch.equal(local(p), first[name]) for name, p in own.items()}
        wrong += [f"{name} of {path}" for name in own if not equal[name]]
    return set(own), wrong


@pytest.mark.parametrize(
    "mesh",
    [
        {},
        pytest.param({"shard": 2}, marks=pytest.mark.long),
        {"shard": 2, "tp": 2},
        {"pp": 2},
        pytest.param({"shard": 4}, marks=pytest.mark.long),
        pytest.param({"replicate": 2, "shard": 2}, marks=pytest.mark.long),
        pytest.param({"cp": 2, "tp": 2}, marks=pytest.mark.slow),
        pytest.param({"pp": 2, "shard": 2}, marks=pytest.mark.long),
    ],
    ids=lambda mesh: "-".join(f"{kind}{degree}" for kind, degree in mesh.items()) or "alone",
)
def test_every_mesh_gets_the_same_model(files, mesh):
    paths = [files.root, files.single, files.bfl, files.comfyui, files.torchtitan]
    ranks = math.prod(mesh.values())
    paths = paths if ranks <= 2 else [files.root, files.bfl]
    of_ranks = run_ranks(ranks, imported, parallelism(**mesh), paths, files.values)
    assert all(wrong == [] for _, wrong in of_ranks), of_ranks
    names = set.union(*(names for names, _ in of_ranks))
    assert names == {name for name in files.values if not name.startswith("guidance_in.")}


def test_scaled_float8_is_cut_with_its_scales(tmp_path):
    """A scale for each row, in layouts that permute rows and columns; ranks hold some of both."""
    state = nonzero_model(ARGS, seed=11).state_dict()
    stored, _, numbers = scaled_float8(to_layout("bfl", state, ARGS), "rows")
    path = tmp_path / "flux1-scaled.safetensors"
    save_file(stored, path)
    numbers = from_layout("bfl", numbers, ARGS)
    of_ranks = run_ranks(4, imported, parallelism(shard=2, tp=2), [path], numbers)
    assert all(wrong == [] for _, wrong in of_ranks), of_ranks


# ---- the run itself --------------------------------------------------------------------------


def beginning(dump: Path, path: Path, *more: str) -> list[str]:
    return arguments(
        dump, 4, "--checkpoint.initial_load_path", str(path), "--training.steps", "2", *more
    )


def loaded(argv: list[str]) -> dict[str, Tensor]:
    """Weights that a trainer has when its loop begins."""
    trainer = FluxTrainer(load_config(argv))
    assert trainer.checkpointer.load()
    assert trainer.step == 0
    values = {
        n: whole(p.detach()) for part in trainer.model_parts for n, p in part.named_parameters()
    }
    trainer.close()
    return values


def test_a_run_begins_with_them(files, tmp_path):
    """torchtitan's flag is understood; guidance goes where checkpoint.guidance_weights says."""
    drop = ("--checkpoint.initial_load_in_hf", "--checkpoint.guidance_weights", "drop")
    for values in run_ranks(2, loaded, beginning(tmp_path, files.guided, *drop)):
        assert values.keys() == {n for n in files.values if not n.startswith("guidance_in.")}
        for name, value in values.items():
            assert torch.equal(value, files.values[name]), name


def guided(function, argv):
    """With a guided flux-tiny; for a process of its own."""
    FLAVORS["flux-tiny"] = GUIDED
    return function(argv)


@pytest.mark.slow
def test_a_guided_run_begins_with_weights_that_have_none(files, tmp_path):
    argv = beginning(tmp_path, files.bfl, "--checkpoint.guidance_weights", "initialize")
    (values,) = run_ranks(1, guided, loaded, argv)
    assert values.keys() == files.values.keys()
    for name, value in values.items():
        if not name.startswith("guidance_in."):
            assert torch.equal(value, files.values[name]), name
    assert values["guidance_in.out_layer.weight"].abs().max() == 0, "it changes nothing at first"
    assert values["guidance_in.in_layer.weight"].abs().max() > 0


@pytest.mark.slow
def test_a_rank_holds_little_more_than_its_shards():
    """Half a GB on two ranks: all of it in each would be 1.3 times of what is allowed.

    Processes of their own: a forked one inherits the memory of the tests before it.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["benchmarks/import_memory.py", "--gigabytes", "0.4", "--hidden", "768"]
    root = Path(__file__).resolve().parents[2]
    command += ["--allowance", "64"]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len(re.findall(r"RssAnon grew by \d+ MB", finished.stdout)) == 2


# ---- what is refused -------------------------------------------------------------------------


def refusals(argvs: list[list[str]]) -> list[str]:
    return [refusal(argv) for argv in argvs]


def test_what_cannot_be_loaded_is_refused_before_anything_is_built(files, tmp_path):
    missing, tensors = tmp_path / "missing.safetensors", load_file(files.bfl)
    save_file({n: x for n, x in tensors.items() if n != "txt_in.bias"}, missing)
    wrong = {missing: "1 missing: txt_in.bias", files.guided: 'guidance_weights = "drop"'}
    dumps = [tmp_path / "one", tmp_path / "other"]
    argvs = [beginning(dump, path) for dump, path in zip(dumps, wrong, strict=True)]
    one, other = run_ranks(2, refusals, argvs)
    assert one == other, "ranks say the same"
    for message, dump, (path, said) in zip(one, dumps, wrong.items(), strict=True):
        assert len(message.splitlines()) == 1, message
        for part in (f'checkpoint.initial_load_path = "{path}": ', said):
            assert part in message, message
        left = [p.name for p in dump.rglob("*") if p.is_file()]
        assert left == [], "the check says it, and nothing is begun"


IN_HF = "--checkpoint.initial_load_in_hf"
SAVED_IN_HF = "--checkpoint.last_save_in_hf"
ENTIRE = "--checkpoint.no-initial_load_model_only"
MODEL_ONLY = "--checkpoint.last_save_model_only"
CONTRADICTIONS = (
    (False, (IN_HF,), "needs checkpoint.initial_load_path"),
    (True, ("--checkpoint.no-enable",), "checkpoint.enable = true"),
    (False, (SAVED_IN_HF,), "checkpoint.last_save_model_only = true"),
    (False, (SAVED_IN_HF, MODEL_ONLY, "--checkpoint.no-enable"), "nothing is loaded or saved"),
    (False, (SAVED_IN_HF, MODEL_ONLY, "--checkpoint.load_only"), "load_only = true does not"),
    (True, (IN_HF, ENTIRE), "checkpoint.initial_load_model_only = true"),
    (True, (IN_HF, "--checkpoint.initial_load_in_hf_quantized"), "initial_load_in_hf_quantized"),
)


@pytest.mark.parametrize(("given", "more", "named"), CONTRADICTIONS)
def test_contradictions_are_named(files, tmp_path, given, more, named):
    path = ("--checkpoint.initial_load_path", str(files.root)) if given else ()
    with pytest.raises(ValueError, match=named) as error:
        load_config(arguments(tmp_path, 8, *path, *more))
    assert len(str(error.value).splitlines()) == 1
