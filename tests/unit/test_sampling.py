"""Schedules against diffusers and the published numbers; Euler and guidance without a model."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from torchtitan_flux.flow_matching import resolution_mu
from torchtitan_flux.latents import Geometry, ImageSize
from torchtitan_flux.sampling import FirstNotFinite, euler, guided, schedule

FLUX = Geometry(channels=16, downscale=8, patch=2)
DEV = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
SCHNELL = {**DEV, "shift": 1.0, "use_dynamic_shifting": False}


def tokens(height: int, width: int) -> int:
    return FLUX.grid(ImageSize(height, width)).tokens


def diffusers_times(config: dict, steps: int, packed: int) -> np.ndarray:
    """The sigmas of a FluxPipeline run, its last zero included."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    mu = calculate_shift(packed, 256, 4096, 0.5, 1.15)
    sigmas = np.linspace(1.0, 1 / steps, steps)
    retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)
    return scheduler.sigmas.double().numpy()


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("size", [(256, 256), (512, 512), (1024, 1024), (768, 1344)])
@pytest.mark.parametrize(("config", "shifted"), [(DEV, True), (SCHNELL, False)])
def test_schedule_equals_diffusers(config, shifted, size, steps):
    found = schedule(steps, tokens(*size), shifted)
    expected = diffusers_times(config, steps, tokens(*size))
    assert found.dtype == np.float64
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-6


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (256, [1, 0.831824, 0.622459, 0.354661, 0]),
        (512, [1, 0.849235, 0.652489, 0.384945, 0]),
        (1024, [1, 0.904531, 0.759511, 0.512844, 0]),
    ],
)
def test_schedule_of_dev_in_four_steps(pixels, expected):
    found = schedule(4, tokens(pixels, pixels), shifted=True)
    assert np.abs(found - expected).max() < 1e-6
    assert (found[0], found[-1]) == (1.0, 0.0)


def test_schedule_of_schnell_ignores_the_size():
    assert schedule(4, 256, shifted=False).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert schedule(4, 4096, shifted=False).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_shift_goes_through_its_two_points_and_beyond():
    assert resolution_mu(256) == pytest.approx(0.5)
    assert resolution_mu(4096) == pytest.approx(1.15)
    assert resolution_mu(16384) == pytest.approx(calculate_shift(16384))


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_one_step_is_refused(steps):
    with pytest.raises(ValueError, match=f"at least 1, not {steps}"):
        schedule(steps, 256, shifted=True)


# ---- Euler ---------------------------------------------------------------------------------

SCHEDULES = {
    "one step": schedule(1, 1024, shifted=False),
    "shifted": schedule(4, 4096, shifted=True),
    "uneven": np.array([1.0, 0.97, 0.5, 0.499, 0.02, 0.0]),
}


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, 7, generator=rng), torch.randn(3, 5, 7, generator=rng)


@pytest.mark.parametrize("name", SCHEDULES)
def test_euler_is_exact_on_straight_paths(name):
    """x_t = (1 - t) data + t noise; the velocity is given once as a constant, once as the field
    of a single data point, (x - data) / t, which asks for the right x and t at every step."""
    data, noise = pair(0)
    for velocity in (
        lambda _x, _t: noise - data,
        lambda x, t: (x - data) / t.view(-1, 1, 1),
    ):
        found = euler(velocity, noise, SCHEDULES[name])
        assert (found - data).abs().max() < 2e-6 * 10


def test_euler_meets_each_time_once_in_order():
    seen: list[torch.Tensor] = []
    steps: list[None] = []

    def velocity(x, t):
        assert t.shape == (3,)
        assert t.dtype == x.dtype == torch.float32
        assert not torch.is_grad_enabled()
        seen.append(t)
        return torch.ones_like(x)

    _, noise = pair(1)
    times = SCHEDULES["uneven"]
    found = euler(velocity, noise.bfloat16(), times, on_step=lambda _: steps.append(None))
    assert torch.stack(seen)[:, 0].tolist() == [np.float32(t) for t in times[:-1]]
    assert len(steps) == len(times) - 1
    assert found.dtype == torch.float32
    assert torch.allclose(found, noise.bfloat16().float() - 1, atol=1e-6)


def test_euler_from_a_time_between():
    """Part of a schedule carries a noised picture on, as image-to-image does."""
    data, noise = pair(2)
    middle = 0.4 * data + 0.6 * noise
    found = euler(lambda _x, _t: noise - data, middle, np.array([0.6, 0.25, 0.0]))
    assert (found - data).abs().max() < 2e-6


def test_the_first_step_that_is_not_finite_is_noted_for_each_sample():
    """Sample 0 stays finite; 1 breaks at the third step, 2 at the second, each in one value."""
    _, noise = pair(4)
    times = schedule(5, 1024, shifted=False)

    def velocity(x, t):
        v = torch.ones_like(x)
        v[2, 1, 3] = torch.inf if t[0] == 0.8 else 1
        v[1, 4, 6] = torch.nan if t[0] < 0.7 else 1
        return v

    watch = FirstNotFinite()
    euler(velocity, noise, times, watch)
    assert watch.first.tolist() == [0, 3, 2]
    euler(lambda x, _: torch.ones_like(x), noise, times, clean := FirstNotFinite())
    assert clean.first.tolist() == [0, 0, 0]


def test_guidance_formula():
    x, _ = pair(3)
    t = torch.tensor([0.1, 0.2, 0.3])

    def conditional(x, t):
        return 2 * x + t.view(-1, 1, 1)

    def unconditional(x, t):
        return x - 3 * t.view(-1, 1, 1)

    for scale in (0.0, 1.0, 4.5):
        expected = (1 - scale) * unconditional(x, t) + scale * conditional(x, t)
        assert torch.allclose(
            guided(conditional, unconditional, scale)(x, t), expected, atol=1e-5, rtol=1e-5
        )
