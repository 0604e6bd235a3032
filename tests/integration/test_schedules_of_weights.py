"""Drawing with weights goes by the schedule that they state, as diffusers' does, and says so."""

import json
import shutil
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from helpers import nonzero_model
from made_weights import make
from PIL import Image
from programs import Said, attempt
from ranks import run_ranks
from tiny_run import arguments

from torchtitan_flux import infer
from torchtitan_flux.latents import ImageSize, pack
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.sampling.generate import initial_noise
from torchtitan_flux.weights.convert import convert

ARGS, SIZE, STEPS, PROMPT = FLAVORS["flux-tiny"], ImageSize(64, 96), 3, "a red circle"
CLASS = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
SCHEDULERS = {
    "static": {**CLASS, "shift": 3.0, "use_dynamic_shifting": False},
    "line": {
        **CLASS,
        "use_dynamic_shifting": True,
        "base_shift": 2.5,
        "max_shift": 3.5,
        "base_image_seq_len": 16,
        "max_image_seq_len": 1024,
        "shift_terminal": 0.05,
    },
    "karras": {**CLASS, "use_karras_sigmas": True},
}


def several(argvs: list[list[str]]) -> list[Said]:
    return [attempt(infer.main, argv) for argv in argvs]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[Path, dict[str, Said]]:
    """Pipelines with each scheduler, what they are converted into, and a picture by each."""
    folder = tmp_path_factory.mktemp("schedules")
    states = nonzero_model(ARGS, seed=3).state_dict()
    convert(make(folder / "made", "bfl", ARGS, states), folder / "plain", "pipeline")
    for name, config in SCHEDULERS.items():
        shutil.copytree(folder / "plain", folder / name)
        (folder / name / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    convert(folder / "static", folder / "static.safetensors", "bfl")
    convert(folder / "line", folder / "again-dcp", "dcp")
    convert(folder / "again-dcp", folder / "again", "pipeline")

    def drawing(out: str, weights: str, *more: str) -> list[str]:
        given = ["--prompt", PROMPT, "--size", str(SIZE), "--steps", str(STEPS), "--seed", "7"]
        given += ["--out", str(folder / f"{out}.png"), "--weights", str(folder / weights)]
        return [*given, *more, *arguments(folder / "run", 8)]

    schnell = ("--sampling.schedule", "schnell")
    commands = {
        "static": drawing("static", "static"),
        "static, low": drawing("static, low", "static", "--low_memory"),
        "static, converted": drawing("static, converted", "static.safetensors"),
        "static, told": drawing("static, told", "static", *schnell),
        "line": drawing("line", "line"),
        "line, converted": drawing("line, converted", "again"),
        "line, checkpoint": drawing("line, checkpoint", "again-dcp", "--cfg", "1"),
        "karras": drawing("karras", "karras"),
        "karras, told": drawing("karras, told", "karras", *schnell),
        "repeated": [
            *("--from-png", str(folder / "static.png"), "--weights", str(folder / "static")),
            *("--out", str(folder / "again.png"), *arguments(folder / "run", 8)),
        ],
    }
    (said,) = run_ranks(1, several, list(commands.values()))
    return folder, dict(zip(commands, said, strict=True))


def of_diffusers(pipeline: Path) -> np.ndarray:
    """The pipeline's picture from our noise, 8 bits a channel."""
    theirs = FluxPipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    noise = pack(initial_noise(ARGS.geometry, SIZE, seed=7, index=0)[None], ARGS.patch_size)
    (picture,) = theirs(
        [PROMPT],
        height=SIZE.height,
        width=SIZE.width,
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        latents=noise,  # type: ignore[arg-type]
        max_sequence_length=32,
        output_type="pil",
    ).images  # type: ignore[union-attr]
    return np.asarray(picture, dtype=int)


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, dtype=int)


@pytest.mark.parametrize(
    ("pipeline", "names"),
    [
        ("static", ("static", "static, low", "static, converted")),
        ("line", ("line", "line, converted", "line, checkpoint")),
    ],
)
def test_pictures_are_diffusers_before_and_after_conversion(drawn, pipeline, names):
    folder, said = drawn
    expected = of_diffusers(folder / pipeline)
    for name in names:
        assert said[name].status == 0, said[name].text
        found = picture(folder / f"{name}.png")
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1, name
    other = picture(folder / "static, told.png")
    assert np.abs(other - expected).max() > 1, "the schedule makes no difference"


def test_what_the_command_line_says_outranks_the_weights(drawn):
    folder, said = drawn
    for name in ("static, told", "karras, told"):
        assert said[name].status == 0, said[name].text
        with Image.open(folder / f"{name}.png") as image:
            assert image.text["schedule"] == "schnell"  # type: ignore[attr-defined]
    assert np.array_equal(
        picture(folder / "static, told.png"), picture(folder / "karras, told.png")
    )


def test_the_schedule_is_said_recorded_and_repeated(drawn):
    folder, said = drawn
    file = folder / "static" / "scheduler" / "scheduler_config.json"
    assert f"Drawn with the schedule shift=3.0, as {file} says" in said["static"].text
    assert said["repeated"].status == 0, said["repeated"].text
    assert np.array_equal(picture(folder / "again.png"), picture(folder / "static.png"))
    with Image.open(folder / "again.png") as image:
        assert image.text["schedule"] == "shift=3.0"  # type: ignore[attr-defined]


def test_what_is_not_computed_is_refused_by_name(drawn):
    folder, said = drawn
    assert said["karras"].status == 2
    (line,) = [one for one in said["karras"].text.splitlines() if "Cannot draw" in one]
    for part in ("karras/scheduler/scheduler_config.json", "use_karras_sigmas = True", "schnell"):
        assert part in line
    assert "Traceback" not in said["karras"].text
    assert not (folder / "karras.png").exists()
