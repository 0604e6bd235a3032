"""Drawing with weights goes by the schedule that they state, as diffusers' does, and says so."""

import json
import shutil
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from programs import Said, attempt
from ranks import run_ranks
from tiny_run import arguments
from weight_files import pipeline

from torchtitan_flux import infer
from torchtitan_flux.image_file import read_facts
from torchtitan_flux.latents import ImageSize, pack
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.sampling.generate import initial_noise
from torchtitan_flux.weights.convert import convert

ARGS, SIZE, STEPS, PROMPT = FLAVORS["flux-tiny"], ImageSize(64, 96), 3, "a red circle"
LINE = {
    **{"use_dynamic_shifting": True, "base_shift": 2.5, "max_shift": 3.5},
    **{"base_image_seq_len": 16, "max_image_seq_len": 1024},
}
SCHEDULERS = {
    "static": {"shift": 3.0, "use_dynamic_shifting": False},
    "line": LINE,
    "karras": {"use_karras_sigmas": True},
}
CLASS = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


def several(argvs: list[list[str]]) -> list[Said]:
    return [attempt(infer.main, argv) for argv in argvs]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[Path, dict[str, Said]]:
    """Pipelines with each scheduler, what they are converted into, and a picture by each."""
    folder = tmp_path_factory.mktemp("schedules")
    plain = pipeline(folder / "plain", ARGS)
    for name, config in SCHEDULERS.items():
        shutil.copytree(plain, folder / name)
        file = folder / name / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(CLASS | config))
    convert(folder / "static", folder / "static-hf", "diffusers")
    convert(folder / "line", folder / "dcp", "dcp")
    convert(folder / "dcp", folder / "again", "pipeline", base=plain)
    settings = ("--prompt", PROMPT, "--size", str(SIZE), "--steps", str(STEPS), "--seed", "7")
    commands = {  # picture -> weights, more
        "static": ("static", *settings),
        "static, low": ("static", *settings, "--low_memory"),
        "static, converted": ("static-hf", *settings),
        "static, schnell": ("static", *settings, "--sampling.schedule", "schnell"),
        "line": ("line", *settings),
        "line, converted": ("again", *settings),
        "line, checkpoint": ("dcp", *settings, "--cfg", "1"),
        "karras": ("karras", *settings),
        "karras, schnell": ("karras", *settings, "--sampling.schedule", "schnell"),
        "repeated": ("static", "--from-png", str(folder / "static.png")),
    }
    run = arguments(folder / "run", 8)
    argvs = [
        ["--weights", f"{folder}/{weights}", "--out", f"{folder}/{out}.png", *more, *run]
        for out, (weights, *more) in commands.items()
    ]
    (said,) = run_ranks(1, several, argvs)
    return folder, dict(zip(commands, said, strict=True))


def of_diffusers(weights: Path) -> np.ndarray:
    """The pipeline's picture from our noise, 8 bits a channel."""
    theirs = FluxPipeline.from_pretrained(weights, torch_dtype=torch.float32)
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
    ("weights", "names"),
    [
        ("static", ("static", "static, low", "static, converted", "repeated")),
        ("line", ("line", "line, converted", "line, checkpoint")),
    ],
)
def test_pictures_are_diffusers_before_and_after_conversion(drawn, weights, names):
    folder, said = drawn
    expected = of_diffusers(folder / weights)
    for name in names:
        assert said[name].status == 0, said[name].text
        found = picture(folder / f"{name}.png")
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1, name
    other = picture(folder / "static, schnell.png")
    assert np.abs(other - expected).max() > 1, "the schedule makes no difference"


def test_the_schedule_is_logged_recorded_and_outranked_by_the_command_line(drawn):
    folder, said = drawn
    file = folder / "static" / "scheduler" / "scheduler_config.json"
    assert f"Drawn with the schedule shift=3.0, as {file} says" in said["static"].text
    for name, schedule in {
        "repeated": "shift=3.0", "static, schnell": "schnell", "karras, schnell": "schnell",
    }.items():  # fmt: skip
        assert said[name].status == 0, said[name].text
        assert read_facts(folder / f"{name}.png")["schedule"] == schedule
    for one, other in (("static, schnell", "karras, schnell"), ("repeated", "static")):
        assert np.array_equal(picture(folder / f"{one}.png"), picture(folder / f"{other}.png"))


def test_what_is_not_computed_is_refused_by_name(drawn):
    folder, said = drawn
    assert said["karras"].status == 2
    (line,) = [one for one in said["karras"].text.splitlines() if "Cannot draw" in one]
    for part in ("karras/scheduler/scheduler_config.json", "use_karras_sigmas = True", "schnell"):
        assert part in line
    assert "Traceback" not in said["karras"].text
    assert not (folder / "karras.png").exists()
