"""Schedules against diffusers and the published numbers; as text; what is refused."""

import json

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from torchtitan_flux.flow_matching import resolution_mu
from torchtitan_flux.latents import Geometry, ImageSize
from torchtitan_flux.sampling.schedules import DEV, SCHNELL, Schedule

FLUX = Geometry(channels=16, downscale=8, patch=2)
PUBLISHED_DEV = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
PUBLISHED_SCHNELL = {**PUBLISHED_DEV, "shift": 1.0, "use_dynamic_shifting": False}
OTHER_LINE = {
    "use_dynamic_shifting": True,
    "base_shift": 0.3,
    "max_shift": 1.7,
    "base_image_seq_len": 100,
    "max_image_seq_len": 3000,
}
CONFIGS = {
    "dev": PUBLISHED_DEV,
    "schnell": PUBLISHED_SCHNELL,
    "defaults": {},
    "shift 3": {"shift": 3.0, "use_dynamic_shifting": False},
    "whole shift below 1": {"shift": 0.25},
    "other line": OTHER_LINE,
    "falling line": {"use_dynamic_shifting": True, "base_shift": 0.9, "max_shift": -0.4},
}


def tokens(height: int, width: int) -> int:
    return FLUX.grid(ImageSize(height, width)).tokens


def diffusers_times(config: dict, steps: int, packed: int) -> np.ndarray:
    """The sigmas of a FluxPipeline run, its last zero included."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    mu = calculate_shift(
        packed,
        scheduler.config["base_image_seq_len"],
        scheduler.config["max_image_seq_len"],
        scheduler.config["base_shift"],
        scheduler.config["max_shift"],
    )
    sigmas = np.linspace(1.0, 1 / steps, steps).tolist()
    retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)
    return np.asarray(scheduler.sigmas, dtype=np.float64)


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("size", [(256, 256), (512, 512), (1024, 1024), (768, 1344)])
@pytest.mark.parametrize("name", CONFIGS)
def test_times_equal_diffusers(name, size, steps):
    config = CONFIGS[name]
    found = Schedule.of_config(config).times(steps, tokens(*size))
    expected = diffusers_times(config, steps, tokens(*size))
    assert found.dtype == np.float64
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(name):
    """As text, and as a configuration of diffusers: the same times, and the same in diffusers."""
    schedule = Schedule.of_config(CONFIGS[name])
    written = json.loads(json.dumps(schedule.config()))
    for again in (Schedule.parse(str(schedule)), Schedule.of_config(written)):
        assert np.array_equal(again.times(5, 1234), schedule.times(5, 1234))
        assert str(again) == str(schedule)
    theirs = {key: value for key, value in written.items() if not key.startswith("_")}
    assert np.abs(diffusers_times(theirs, 5, 1234) - schedule.times(5, 1234)).max() <= 1e-6


def test_published_schedules_have_names():
    assert Schedule.of_config(PUBLISHED_DEV) == DEV == Schedule.parse("dev")
    assert Schedule.of_config(PUBLISHED_SCHNELL) == SCHNELL == Schedule.parse("schnell")
    assert (str(DEV), str(SCHNELL)) == ("dev", "schnell")
    assert str(Schedule.parse("use_dynamic_shifting=true")) == "dev"
    assert str(Schedule.parse(" shift = 3")) == "shift=3.0"
    assert (Schedule.of_flavor(True), Schedule.of_flavor(False)) == (DEV, SCHNELL)
    written = {key: value for key, value in DEV.config().items() if not key.startswith("_")}
    assert written == PUBLISHED_DEV


def test_published_times_in_four_steps():
    for pixels, expected in (
        (256, [1, 0.831824, 0.622459, 0.354661, 0]),
        (512, [1, 0.849235, 0.652489, 0.384945, 0]),
        (1024, [1, 0.904531, 0.759511, 0.512844, 0]),
    ):
        assert np.abs(DEV.times(4, tokens(pixels, pixels)) - expected).max() < 1e-6
    for length in (256, 4096):
        assert SCHNELL.times(4, length).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_mu_goes_through_its_two_points_and_beyond():
    assert resolution_mu(256) == pytest.approx(0.5)
    assert resolution_mu(4096) == pytest.approx(1.15)
    assert resolution_mu(16384) == pytest.approx(calculate_shift(16384))


def test_what_has_no_times_is_refused():
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1, not {steps}"):
            DEV.times(steps, 256)
    schedule = Schedule.parse("use_dynamic_shifting=true,max_shift=1e300")
    with pytest.raises(ValueError, match="at 300 image tokens the schedule use_dynamic"):
        schedule.times(4, 300)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "it is a DDIMScheduler; only FlowMatchEuler"),
        ({"use_karras_sigmas": True, "shift": 3.0}, "use_karras_sigmas = True: not computed here"),
        (
            {"invert_sigmas": True, "shift_terminal": 0.02, "time_shift_type": "linear"},
            "invert_sigmas = True; shift_terminal = 0.02; time_shift_type = 'linear': not",
        ),
        ({"num_train_timesteps": 500}, "num_train_timesteps = 500, FLUX.1 has 1000"),
        ({"shift": "3"}, "shift = '3': .*number"),
        ({"shift": 0}, "shift = 0: .*greater than 0"),
        ({"shift": float("inf")}, "shift = inf: .*finite"),
        ({"use_dynamic_shifting": "yes"}, "use_dynamic_shifting = 'yes': .*boolean"),
        ({"base_image_seq_len": 4096}, "base_image_seq_len and max_image_seq_len must differ"),
        ({"max_image_seq_len": 4096.5}, "max_image_seq_len = 4096.5: .*integer"),
    ],
)
def test_what_is_not_computed_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        Schedule.of_config(config)


def test_null_is_the_default():
    """As diffusers writes what is unset."""
    nothing = dict.fromkeys(("shift_terminal", "base_shift", "time_shift_type"))
    assert Schedule.of_config({**PUBLISHED_DEV, **nothing, "use_karras_sigmas": False}) == DEV


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Dev", '\'Dev\' is unknown; "dev", "schnell"'),
        ("shift=3,karras=true", "'karras=true' is unknown"),
        ("shift=much", "shift = 'much': .*number"),
        ("base_shift=0.4", "base_shift counts only with use_dynamic_shifting=true"),
        ("shift=2,use_dynamic_shifting=true", "shift counts only without"),
    ],
)
def test_text_that_is_no_schedule_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        Schedule.parse(text)
