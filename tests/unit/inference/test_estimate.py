"""What drawing takes, before anything is loaded; and what is said where it does not fit."""

from dataclasses import replace

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch

from torchtitan_flux.inference.command import Task
from torchtitan_flux.inference.draw import AT_ONCE, Request
from torchtitan_flux.inference.estimate import Estimate, Phase, estimate, refusal
from torchtitan_flux.inference.expectation import Expectation
from torchtitan_flux.inference.memory import free_memory, text_of
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.planning.command import model_args
from torchtitan_flux.sampling.generate import SampleSettings
from torchtitan_flux.sampling.schedules import Schedule
from torchtitan_flux.startup.load_config import read_config

FLOAT32 = ("--training.mixed_precision_param", "float32")
GIB = 2**30
SETTINGS = SampleSettings(ImageSize(512, 512), 28, guidance=3.5, schedule=Schedule.of_flavor(True))
DEV = FLAVORS["flux-dev"]


@pytest.fixture(scope="module")
def config():
    return read_config(["--job.config_file", "train_configs/flux_dev_model.toml"])


def of_dev(config, low_memory: bool, ranks: int = 1, **changes) -> Estimate:
    return estimate(
        config, DEV, replace(SETTINGS, **changes), 1, ranks, low_memory, torch.bfloat16, "cuda"
    )


def test_flux_dev_at_512_fits_8_gb_by_streaming_and_not_otherwise(config):
    """Nothing of it has to be here; all phases fit, also where a context takes a gigabyte."""
    low, normal = of_dev(config, True), of_dev(config, False)
    assert low.peak < 7 * 1e9
    assert low.assumed == ("T5-XXL", "CLIP-L", "FLUX.1's autoencoder")
    # 11.9 and 4.8 milliards of weights, two bytes each
    assert normal.peak > (11.9e9 + 4.76e9) * 2
    # two double blocks of 340 million weights must be there, and no third one
    transformer = low.phases[1].loaded
    assert 2 * 2 * 339e6 < transformer < 3 * 2 * 339e6
    assert refusal(low, None, 8 * 10**9, 1, SETTINGS) is None


def test_ranks_share_weights_unless_each_streams(config):
    assert of_dev(config, False, ranks=8).peak < 0.25 * of_dev(config, False).peak
    assert of_dev(config, True, ranks=8) == of_dev(config, True)


def test_captions_are_counted_in_portions():
    """With --low_memory on CPUs they lie in the memory that is counted, those of a portion."""
    argv = ["--job.config_file", "train_configs/debug_model.toml", "--model.flavor", "flux-tiny"]
    config = read_config([*argv, "--encoder.max_t5_encoding_len", "4096", *FLOAT32])
    args = model_args(config)
    settings = SampleSettings(ImageSize(64, 64), 2)

    def low(count: int) -> list[int]:
        requests = [Request("a", i) for i in range(count)]
        task = Task(requests, settings, "", [], 2)
        return [phase.work for phase in Expectation.of(config, args, task, 1).low.phases]

    two, ten, all_of_it, many = low(2), low(10), low(AT_ONCE), low(5000)
    caption = (4096 * args.context_in_dim + args.vec_in_dim) * 4
    assert [b - a for a, b in zip(two, ten, strict=True)] == [16 * caption, 8 * caption, 0]
    assert many == all_of_it > ten


def test_a_refusal_names_sizes_and_what_helps(config):
    low, normal = of_dev(config, True), of_dev(config, False)
    said = refusal(normal, low, 8 * GIB, 4, SETTINGS)
    assert said is not None
    for part in (
        f"needs about {text_of(normal.peak)}, and 8.0 GiB are free",
        "--low_memory (about 1.6 GiB, which fits)",
        "--inference.local_batch_size 1 (now 4)",
        "--size (now 512x512)",
    ):
        assert part in said
    tight = refusal(low, None, GIB, 1, SETTINGS)
    assert tight is not None
    assert "--low_memory" not in tight
    assert "local_batch_size" not in tight
    assert "does not fit either" in str(refusal(normal, low, GIB, 1, SETTINGS))


def test_the_peak_is_that_of_the_dearest_phase():
    one = Estimate((Phase("a", 5, 2), Phase("b", 3, 6), Phase("c", 8, 0)))
    assert one.peak == 9
    assert refusal(one, None, 9, 1, SETTINGS) is None
    assert "the b: 3" in str(refusal(one, None, 8, 1, SETTINGS)).replace("0 MiB", "3")


def test_ranks_of_a_machine_share_what_is_free(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = free_memory(cpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0.5 < 4 * free_memory(cpu) / alone < 2
    assert 2**20 < alone < 2**50
