"""The schedule that weights state: kept by folders, exported from a run, found again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import numpy as np
import pytest
import weight_files as made
from diffusers import FlowMatchEulerDiscreteScheduler

from torchtitan_flux.sampling.schedules import DEV, SCHNELL, Schedule
from torchtitan_flux.startup.checks import problems
from torchtitan_flux.startup.dump_config import resolved_toml
from torchtitan_flux.startup.load_config import read_config
from torchtitan_flux.startup.model_args import resolve_model_args, sampling_schedule
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.weights.convert import convert
from torchtitan_flux.weights.scheduler import SCHEDULER_FILE, of_run, stated_scheduler

SHIFT_3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "x": [1]}
DDIM = {"_class_name": "DDIMScheduler", "beta_start": 0.00085}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    return made.pipeline(folder / "pipeline", made.FOR_PIPELINE)


@pytest.fixture
def pipeline(plain, tmp_path) -> Path:
    return shutil.copytree(plain, tmp_path / "pipeline")


def with_scheduler(pipeline: Path, config: dict) -> Path:
    (pipeline / "scheduler" / SCHEDULER_FILE).write_text(json.dumps(config))
    return pipeline


# ---- conversion ----------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SHIFT_3, DDIM], ids=["shift 3", "ddim"])
@pytest.mark.parametrize("format", ["dcp", "diffusers", "pipeline"])
def test_every_folder_keeps_it(pipeline, tmp_path, format, config):
    """Also a scheduler that is not computed here: others do."""
    with_scheduler(pipeline, config)
    other = tmp_path / "other"
    convert(pipeline, other, format)
    stated = stated_scheduler(other)
    assert stated is not None
    assert stated.config == config
    with_scheduler(pipeline, {})
    convert(other, tmp_path / "again", "pipeline", base=pipeline)
    assert json.loads((tmp_path / "again/scheduler" / SCHEDULER_FILE).read_text()) == config
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", config["_class_name"]]


def test_what_lies_in_a_pipeline_is_drawn_as_it(pipeline, tmp_path):
    with_scheduler(pipeline, SHIFT_3)
    weights = next((pipeline / "transformer").glob("*.safetensors"))
    single = shutil.copy(weights, pipeline / "flux1-dev.safetensors")
    for path in (pipeline / "transformer", weights, Path(single)):
        assert schedule_of(path) == Schedule(3.0)
    assert stated_scheduler(tmp_path / ("x" * 300)) is None


@pytest.mark.parametrize("text", ["{", "[]", "\ufeff{}"])
def test_what_cannot_be_read_names_the_file(pipeline, tmp_path, text):
    (pipeline / "scheduler" / SCHEDULER_FILE).write_text(text)
    with pytest.raises(UnreadableWeights, match=r"scheduler/scheduler_config\.json"):
        convert(pipeline, tmp_path / "out", "dcp")
    assert not (tmp_path / "out").exists()


# ---- runs ----------------------------------------------------------------------------------


def run(folder: Path, schedule: str, begun: Path | str = "", flavor: str = "flux-dev") -> Path:
    """A run's folder with a checkpoint, as `stated_scheduler` looks at it."""
    step = folder / "checkpoint" / "step-7"
    step.mkdir(parents=True)
    (step / ".metadata").touch()
    config = {
        "model": {"flavor": flavor},
        "sampling": {"schedule": schedule},
        "checkpoint": {"initial_load_path": str(begun)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return step


def schedule_of(path: Path) -> Schedule:
    stated = stated_scheduler(path)
    assert stated is not None
    return stated.schedule()


def test_a_checkpoint_is_drawn_as_its_run_draws(pipeline, tmp_path):
    with_scheduler(pipeline, SHIFT_3)
    own = tmp_path / "own" / "checkpoint" / "step-7"
    for name, step, expected in (
        ("told", run(tmp_path / "told", "shift=2"), Schedule(2.0)),
        ("auto", run(tmp_path / "auto", "auto"), DEV),
        ("schnell", run(tmp_path / "schnell", "auto", flavor="flux-schnell"), SCHNELL),
        ("begun", run(tmp_path / "begun", "auto", pipeline), Schedule(3.0)),
        ("gone", run(tmp_path / "gone", "auto", tmp_path / "nowhere"), DEV),
        ("own", run(tmp_path / "own", "auto", own), DEV),
    ):
        assert schedule_of(step) == expected, name
    twice = run(tmp_path / "twice", "auto", tmp_path / "begun" / "checkpoint" / "step-7")
    assert schedule_of(twice) == Schedule(3.0)
    assert of_run(twice.parent) == stated_scheduler(twice)
    assert of_run(tmp_path) is None
    with pytest.raises(UnreadableWeights, match=r"sampling\.schedule = 'fast': 'fast' is unknown"):
        stated_scheduler(run(tmp_path / "wrong", "fast"))


@pytest.mark.parametrize(
    "schedule", ["shift=3.0", "use_dynamic_shifting=true,base_shift=0.9,max_shift=2.0"]
)
def test_the_schedule_of_a_run_is_exported(tmp_path, schedule):
    """diffusers builds the same times from what `last_save_in_hf` and conversions write."""
    args = replace(made.ARGS, depth=1, depth_single_blocks=1)
    step = made.make(tmp_path, "dcp", args, made.state_dict(args))
    config = {"model": {"flavor": "flux-tiny"}, "sampling": {"schedule": schedule}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert(step, tmp_path / "out", "diffusers", args=args)
    theirs = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "out")
    assert isinstance(theirs, FlowMatchEulerDiscreteScheduler)
    ours = Schedule.parse(schedule).times(9, 1024)
    mu = 0.9 + (2.0 - 0.9) * (1024 - 256) / (4096 - 256)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 9, 9).tolist(), mu=mu)
    assert np.abs(np.asarray(theirs.sigmas) - ours).max() <= 1e-6
    assert np.abs(ours - DEV.times(9, 1024)).max() > 0.01


# ---- configuration -------------------------------------------------------------------------


def configured(dump: Path, begun: Path | str, *more: str):
    argv = ["--job.config_file", "train_configs/debug_model.toml", "--model.flavor", "flux-tiny"]
    argv += ["--job.dump_folder", str(dump), "--training.img_size", "64", "--checkpoint.enable"]
    return read_config([*argv, "--checkpoint.initial_load_path", str(begun), *more])


def test_a_run_draws_as_what_it_began_with(pipeline, tmp_path):
    with_scheduler(pipeline, SHIFT_3)
    dump = tmp_path / "run"
    config = configured(dump, pipeline)
    args = resolve_model_args(config)
    assert sampling_schedule(config, args) == Schedule(3.0)
    assert 'schedule = "shift=3.0"' in resolved_toml(config)
    told = configured(dump, pipeline, "--sampling.schedule", "schnell")
    assert sampling_schedule(told, args) == SCHNELL
    assert 'schedule = "schnell"' in resolved_toml(told)
    dump.mkdir()
    (dump / "config.toml").write_text(resolved_toml(config))
    assert sampling_schedule(configured(dump, ""), args) == SCHNELL, "a new run in an old folder"
    # its checkpoints are drawn alike when the pipeline is not named any more, or gone
    made.save_checkpoint(dump / "checkpoint" / "step-7", args, {})
    shutil.rmtree(pipeline)
    assert sampling_schedule(config, args) == Schedule(3.0)
    assert sampling_schedule(configured(dump, ""), args) == Schedule(3.0)
    assert sampling_schedule(configured(tmp_path / "other", pipeline), args) == SCHNELL


def about_schedules(config: Any) -> list[str]:
    """What the check says of them; the pipeline is of no flavor, which it says too."""
    return [str(problem) for problem in problems(config) if "axes_dim" not in problem.message]


def test_grids_that_could_not_be_drawn_are_found_by_the_check(pipeline, tmp_path):
    with_scheduler(pipeline, DDIM)
    drawing = ("--sampling.enable", "--sampling.prompts", "a")
    (said,) = about_schedules(configured(tmp_path / "run", pipeline, *drawing))
    for part in ("checkpoint.initial_load_path", "DDIMScheduler", "sampling.schedule, as"):
        assert part in said
    assert about_schedules(configured(tmp_path / "run", pipeline, "--sampling.no-enable")) == []
    told = (*drawing, "--sampling.schedule", "shift=3")
    assert about_schedules(configured(tmp_path / "run", pipeline, *told)) == []


def test_a_spoilt_scheduler_is_found_by_the_check_whether_or_not_grids_are_drawn(
    pipeline, tmp_path
):
    """It would be found after training else, when the run is exported."""
    (pipeline / "scheduler" / SCHEDULER_FILE).write_text('{"shift": 3.0')
    for more in (("--sampling.enable", "--sampling.prompts", "a"), ("--sampling.no-enable",)):
        (said,) = about_schedules(configured(tmp_path / "run", pipeline, *more))
        assert said.startswith("checkpoint.initial_load_path: ")
        for part in (SCHEDULER_FILE, "is not JSON", "sampling.schedule"):
            assert part in said
