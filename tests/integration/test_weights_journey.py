"""From FLUX weights through a run and back: import, train, export, import again, draw."""

import io
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from helpers import nonzero_model
from PIL import Image
from ranks import keep_process_group, run_ranks
from safetensors.torch import load_file
from tiny_run import Run, arguments, train
from weight_files import bfl_file, pipeline_root

from torchtitan_flux import infer
from torchtitan_flux.checkpoint.manifest import Manifest
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.weights import export
from torchtitan_flux.weights.key_maps import to_layout

ARGS = FLAVORS["flux-tiny"]
EXPORT = ("--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only")


def run(ranks: int, dump: Path, steps: int, *more: str, change=None) -> Run:
    argv = arguments(
        dump,
        8 // ranks,
        "--training.steps",
        str(steps),
        "--lr_scheduler.warmup_steps",
        "1",
        "--validation.no-enable",
        *more,
    )
    return run_ranks(ranks, train, argv, change)[0]


def beginning(path: Path) -> tuple[str, str]:
    return "--checkpoint.initial_load_path", str(path)


@dataclass(frozen=True)
class Journey:
    """Five steps from a diffusers folder, exported."""

    dump: Path
    original: Path
    first: Run

    @property
    def dcp(self) -> Path:
        return self.dump / "checkpoint/step-5"

    @property
    def exported(self) -> Path:
        return self.dump / "checkpoint/step-5-hf"


@pytest.fixture(scope="module")
def journey(tmp_path_factory) -> Journey:
    folder = tmp_path_factory.mktemp("journey")
    original = pipeline_root(folder / "original", nonzero_model(ARGS, seed=5).state_dict(), ARGS)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(original / "scheduler")
    first = run(2, folder / "run", 5, *beginning(original), *EXPORT)
    assert first.error == ""
    return Journey(folder / "run", original, first)


def test_the_last_step_is_a_checkpoint_and_a_folder_that_diffusers_opens(journey):
    assert Manifest.read(journey.dcp).kind == "model"
    model = FluxTransformer2DModel.from_pretrained(journey.exported, local_files_only=True)
    theirs = to_layout("diffusers", journey.first.weights, ARGS)
    found = model.state_dict()
    assert found.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(found[name], value), name
    left = sorted(path.name for path in journey.dcp.parent.iterdir())
    assert left == ["step-5", "step-5-hf"]


def test_training_on_from_the_export_is_training_on_from_the_checkpoint(journey, tmp_path):
    """The fold there and back changed no bit, and the optimizer begins anew in both."""
    one = run(1, tmp_path / "hf", 2, *beginning(journey.exported))
    other = run(1, tmp_path / "dcp", 2, *beginning(journey.dcp))
    assert list(one.losses) == [1, 2]
    assert one.losses == other.losses
    for name, value in other.weights.items():
        assert torch.equal(one.weights[name], value), name
    assert abs(journey.first.losses[1] / one.losses[1] - 1) > 1e-3, "five steps were trained"


def no_room(*_, **__) -> None:
    raise OSError("no room")


def test_an_export_that_fails_loses_nothing_and_is_made_up_for(journey, tmp_path, monkeypatch):
    """Started again, the run is finished: it reads no foreign weights, and writes the folder."""
    monkeypatch.setattr(export, "convert", no_room)
    in_bf16 = (*EXPORT, "--checkpoint.export_dtype", "bfloat16")
    failed = run(1, tmp_path, 1, *in_bf16)
    assert failed.error.startswith("CheckpointNotSaved")
    for part in ("step-1 is saved", "step-1-hf could not be written", "convert_checkpoint.py"):
        assert part in failed.error
    assert Manifest.read(tmp_path / "checkpoint/step-1").kind == "model"

    monkeypatch.undo()
    again = run(1, tmp_path, 1, *beginning(journey.original), *in_bf16)
    assert (again.error, again.losses) == ("", {})
    assert "checkpoint.initial_load_path is not read" in again.log
    rounded = {name: value.bfloat16() for name, value in failed.weights.items()}
    theirs = to_layout("diffusers", rounded, ARGS)
    weights = tmp_path / "checkpoint/step-1-hf/diffusion_pytorch_model.safetensors"
    found = load_file(weights)
    assert found.keys() == theirs.keys()
    for name, value in theirs.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], value), name


def test_ranks_wait_for_an_export_longer_than_for_a_step(tmp_path):
    def wait() -> str:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)

        def slow_and_failing(*_, **__):
            time.sleep(3)
            raise OSError("no room")

        export.convert = slow_and_failing  # a process of its own
        problem = export.export_beside(tmp_path / "step-1", ARGS)
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=60), dist.group.WORLD)
        return problem

    assert run_ranks(2, wait) == ["OSError: no room"] * 2


# ---- drawing ---------------------------------------------------------------------------------


def draw(argvs: list[list[str]]) -> list[str]:
    """`run_infer.sh` without its launcher, several times; what each said on leaving early."""
    keep_process_group()
    said = []
    for argv in argvs:
        sys.argv[1:] = argv
        sys.stderr = io.StringIO()
        try:
            infer.main()
            said.append("")
        except SystemExit as leaving:
            said.append(f"status {leaving.code}: {sys.stderr.getvalue()}")
    return said


def drawing(dump: Path, out: Path, *more: str) -> list[str]:
    own = ("--prompt", "a red circle", "--steps", "2", "--seed", "4", "--out", str(out))
    return [*own, *more, *arguments(dump, 8)]


def test_pictures_are_drawn_from_every_kind_of_weights(journey, tmp_path):
    bfl = bfl_file(tmp_path / "flux1-tiny.safetensors", journey.first.weights, ARGS)
    root = pipeline_root(tmp_path / "pipeline", journey.first.weights, ARGS)
    (root / "text_encoder").symlink_to(Path("assets/tiny/clip").resolve())
    (root / "text_encoder_2").symlink_to(Path("assets/tiny/t5").resolve())
    (root / "vae").symlink_to(Path("assets/tiny/vae").resolve())
    nowhere = tmp_path / "no run"
    kinds = {"dcp": journey.dcp, "folder": journey.exported, "root": root, "bfl": bfl}
    own = tmp_path / "own.png"
    as_trained = ("--sampling.schedule", "shift=3")
    told = {"root": as_trained, "bfl": as_trained}  # the others say it themselves
    argvs = [drawing(journey.dump, own)] + [
        drawing(nowhere, tmp_path / f"{kind}.png", "--weights", str(path), *told.get(kind, ()))
        for kind, path in kinds.items()
    ]
    assert run_ranks(1, draw, argvs) == [[""] * len(argvs)]
    with Image.open(own) as reference:
        assert reference.text["checkpoint"] == str(journey.dcp)  # type: ignore[attr-defined]
        for kind, path in kinds.items():
            with Image.open(tmp_path / f"{kind}.png") as picture:
                assert picture.tobytes() == reference.tobytes(), kind
                facts = picture.text  # type: ignore[attr-defined]
                assert facts["weights"] == str(path)
                assert "checkpoint" not in facts


def test_a_pipeline_folder_brings_its_encoders(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    for folder in ("text_encoder", "text_encoder_2"):
        (tmp_path / folder).mkdir()
    weights = ["--weights", str(tmp_path)]
    _, rest = infer.parse([*weights, "--encoder.clip-encoder=mine", "--model.flavor", "flux-dev"])
    assert rest == [
        "--encoder.clip-encoder=mine", "--model.flavor", "flux-dev",
        "--encoder.t5_encoder", str(tmp_path / "text_encoder_2"),
    ]  # fmt: skip
    (tmp_path / "model_index.json").unlink()
    assert infer.parse(weights)[1] == []
