"""The schedule that weights state: kept through every format, exported from a run, found again."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import made_weights as made
import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from torchtitan_flux.sampling.schedules import DEV, SCHNELL, Schedule
from torchtitan_flux.startup.checks import problems
from torchtitan_flux.startup.dump_config import resolved_toml
from torchtitan_flux.startup.load_config import read_config
from torchtitan_flux.startup.model_args import resolve_model_args, sampling_schedule
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.weights.convert import convert
from torchtitan_flux.weights.scheduler import (
    SCHEDULER_FILE,
    SCHEDULER_KEY,
    of_run,
    stated_scheduler,
)

ARGS = replace(made.ARGS, in_channels=64, out_channels=64, vec_in_dim=32, context_in_dim=32)
"""Widths of assets/tiny, so that a pipeline can be made."""
SHIFT_3 = '{"_class_name": "FlowMatchEulerDiscreteScheduler",\r\n  "shift": 3.0,  "x": [1]}'
DDIM = '{"_class_name": "DDIMScheduler", "beta_start": 0.00085}'
NAMES = {"dcp": "step-0", "bfl": "flux1-a.safetensors", "comfyui": "b.safetensors"}


def with_scheduler(pipeline: Path, text: str, name: str | None = None) -> Path:
    """Give a pipeline's folder another scheduler."""
    (pipeline / "scheduler" / SCHEDULER_FILE).write_bytes(text.encode())
    index = json.loads((pipeline / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", name or json.loads(text)["_class_name"]]
    (pipeline / "model_index.json").write_text(json.dumps(index))
    return pipeline


def text_of(path: Path) -> str:
    stated = stated_scheduler(path)
    assert stated is not None
    return stated.text


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    source = made.make(folder / "made", "bfl", ARGS, made.state_dict(ARGS))
    assert stated_scheduler(source) is None
    convert(source, folder / "pipeline", "pipeline")
    return folder / "pipeline"


@pytest.fixture
def pipeline(plain, tmp_path) -> Path:
    return shutil.copytree(plain, tmp_path / "pipeline")


# ---- conversion ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", [SHIFT_3, DDIM], ids=["shift 3", "ddim"])
@pytest.mark.parametrize("format", ["dcp", "bfl", "comfyui", "diffusers", "pipeline"])
def test_every_format_keeps_it_to_the_letter(pipeline, tmp_path, format, text):
    """Also a scheduler that is not computed here: others do."""
    with_scheduler(pipeline, text)
    other = tmp_path / NAMES.get(format, f"to-{format}")
    convert(pipeline, other, format)
    assert text_of(other) == text
    convert(other, tmp_path / "again", "pipeline")
    assert (tmp_path / "again" / "scheduler" / SCHEDULER_FILE).read_bytes() == text.encode()
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", json.loads(text)["_class_name"]]


def test_a_single_file_says_it_in_its_metadata(pipeline, tmp_path):
    with_scheduler(pipeline, SHIFT_3)
    convert(pipeline, tmp_path / "flux1-a.safetensors", "bfl")
    moved = shutil.move(tmp_path / "flux1-a.safetensors", tmp_path / "other.safetensors")
    assert text_of(Path(moved)) == SHIFT_3
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(moved), bare)
    assert stated_scheduler(bare) is None


def test_what_lies_in_a_pipeline_is_drawn_as_it(pipeline):
    with_scheduler(pipeline, SHIFT_3)
    weights = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    single = shutil.copy(weights, pipeline / "flux1-dev.safetensors")
    for path in (pipeline / "transformer", weights, Path(single)):
        assert text_of(path) == SHIFT_3


def test_the_index_of_a_pipeline_says_which_scheduler_it_is(pipeline, tmp_path):
    with_scheduler(pipeline, SHIFT_3, "UniPCMultistepScheduler")
    stated = stated_scheduler(pipeline)
    assert stated is not None
    with pytest.raises(UnreadableWeights, match="it is a UniPCMultistepScheduler"):
        stated.schedule()
    convert(pipeline, tmp_path / "b.safetensors", "comfyui")
    named = json.loads(text_of(tmp_path / "b.safetensors"))
    assert named == {**json.loads(SHIFT_3), "_class_name": "UniPCMultistepScheduler"}


def test_settings_that_diffusers_leaves_aside_are_named(pipeline, caplog):
    stated = stated_scheduler(with_scheduler(pipeline, SHIFT_3))
    assert stated is not None
    assert stated.schedule() == Schedule(3.0)
    assert "x = [1] is no setting of FlowMatchEulerDiscreteScheduler" in caplog.text


@pytest.mark.parametrize("text", ["{", "[]", "\ufeff{}"])
def test_what_cannot_be_read_names_the_file(pipeline, tmp_path, text):
    with_scheduler(pipeline, text, "FlowMatchEulerDiscreteScheduler")
    with pytest.raises(UnreadableWeights, match=r"scheduler/scheduler_config\.json"):
        convert(pipeline, tmp_path / "out", "dcp")
    assert not (tmp_path / "out").exists()
    weights = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    file = tmp_path / "a.safetensors"
    save_file(load_file(weights), file, metadata={SCHEDULER_KEY: text})
    with pytest.raises(UnreadableWeights, match=rf"a\.safetensors: its {SCHEDULER_KEY}"):
        stated_scheduler(file)


def test_weights_that_are_none_are_named_when_they_are_opened(tmp_path):
    file = tmp_path / "flux1-dev.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert stated_scheduler(file) is None
    assert stated_scheduler(tmp_path) is None
    assert stated_scheduler(tmp_path / ("x" * 300)) is None


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
    cache = tmp_path / "models--org--flux"
    shutil.copytree(pipeline, cache / "snapshots" / "abc")
    own = tmp_path / "own" / "checkpoint" / "step-7"
    for name, step, expected in (
        ("told", run(tmp_path / "told", "shift=2"), Schedule(2.0)),
        ("auto", run(tmp_path / "auto", "auto"), DEV),
        ("schnell", run(tmp_path / "schnell", "auto", flavor="flux-schnell"), SCHNELL),
        ("begun", run(tmp_path / "begun", "auto", pipeline), Schedule(3.0)),
        ("cached", run(tmp_path / "cached", "auto", cache), Schedule(3.0)),
        ("gone", run(tmp_path / "gone", "auto", tmp_path / "nowhere"), DEV),
        ("own", run(tmp_path / "own", "auto", own), DEV),
    ):
        assert schedule_of(step) == expected, name
    twice = run(tmp_path / "twice", "auto", tmp_path / "begun" / "checkpoint" / "step-7")
    assert schedule_of(twice) == Schedule(3.0)
    assert of_run(twice.parent) == stated_scheduler(twice)
    assert of_run(tmp_path / "auto" / "checkpoint") is None
    assert of_run(tmp_path) is None
    with pytest.raises(UnreadableWeights, match=r"sampling\.schedule = 'fast': 'fast' is unknown"):
        stated_scheduler(run(tmp_path / "wrong", "fast"))


@pytest.mark.parametrize("format", ["diffusers", "pipeline"])
@pytest.mark.parametrize(
    "schedule", ["shift=3.0", "use_dynamic_shifting=true,base_shift=0.9,max_shift=2.0"]
)
def test_the_schedule_of_a_run_is_exported(tmp_path, schedule, format):
    """diffusers builds the same times from what `last_save_in_hf` and conversions write."""
    step = made.make(tmp_path, "dcp", ARGS, made.state_dict(ARGS))
    config = {"model": {"flavor": "flux-tiny"}, "sampling": {"schedule": schedule}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert(step, tmp_path / "out", format, args=ARGS)
    folder = tmp_path / "out" / ("scheduler" if format == "pipeline" else "")
    theirs = FlowMatchEulerDiscreteScheduler.from_pretrained(folder)
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
    (dump / "checkpoint" / "step-7").mkdir(parents=True)
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
    told = ("--sampling.no-enable", "--sampling.schedule", "shift=3")
    assert about_schedules(configured(tmp_path / "run", pipeline, *told)) == []
