"""The shipped configurations build and train; what they cannot do is refused by name."""

import os
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import tomli as tomllib
import torch
from ranks import run_ranks
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_flux.startup.load_config import load_config
from torchtitan_flux.startup.model_args import resolve_model_args, sample_settings
from torchtitan_flux.training.trainer import FluxTrainer

CONFIGS = sorted(Path("train_configs").glob("*.toml"))


def overrides(dump: Path, **keys: object) -> list[str]:
    return [
        part
        for key, value in {"job.dump_folder": dump, **keys}.items()
        for part in (f"--{key.replace('__', '.')}", str(value))
    ]


def test_the_shipped_files_are_these():
    assert [path.stem for path in CONFIGS] == [
        "debug_model",
        "flux_dev_model",
        "flux_digits",
        "flux_mnist",
        "flux_schnell_model",
    ]


def train_a_little(argv: list[str]) -> tuple[float, torch.Tensor]:
    """Two steps, then a picture of the word "three"."""
    trainer = FluxTrainer(load_config(argv))
    before = [p.detach().clone() for p in trainer.model_parts[0].parameters()]
    trainer.train()
    moved = max(
        float((p - b).full_tensor().abs().max())
        for p, b in zip(trainer.model_parts[0].parameters(), before, strict=True)
    )
    settings = sample_settings(trainer.job_config, trainer.model_args)
    images = trainer.image_sampler.sample(["three"], settings)
    trainer.close()
    return moved, images


@pytest.mark.parametrize(("channels", "dataset"), [(1, "digits"), (3, "shapes")])
def test_flux_mnist_trains_with_one_and_with_three_channels(tmp_path, channels, dataset):
    argv = [
        "--job.config_file", "train_configs/flux_mnist.toml",
        *overrides(
            tmp_path, training__steps=2, training__local_batch_size=2, training__dataset=dataset,
            encoder__pixel_channels=channels, validation__local_batch_size=4, validation__steps=1,
            sampling__images_per_prompt=1, sampling__denoising_steps=2,
        ),
        "--sampling.prompts", "one,two",
    ]  # fmt: skip
    ((moved, images),) = run_ranks(1, train_a_little, argv)
    assert moved > 0
    assert images.shape == (1, channels, 32, 32)
    assert images.isfinite().all()


def test_compute_is_float32_on_cpu_unless_the_key_says_otherwise(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU computes in bfloat16 by default")
    file = ["--job.config_file", "train_configs/flux_digits.toml"]
    assert load_config(file).training.mixed_precision_param == "float32"
    given = load_config([*file, "--training.mixed_precision_param", "bfloat16"])
    assert given.training.mixed_precision_param == "bfloat16"
    text = (
        Path(file[1])
        .read_text()
        .replace("[training]\n", '[training]\nmixed_precision_param = "bfloat16"\n')
    )
    (tmp_path / "own.toml").write_text(text)
    own = load_config(["--job.config_file", str(tmp_path / "own.toml")])
    assert own.training.mixed_precision_param == "bfloat16"


def test_widths_follow_the_encoders_but_not_in_published_flavors():
    config = load_config(["--job.config_file", "train_configs/debug_model.toml"])
    args = resolve_model_args(config)
    assert (args.context_in_dim, args.vec_in_dim, args.in_channels) == (32, 32, 64)
    config.model.flavor = "flux-dev"
    with pytest.raises(ValueError, match=r"encoder\.t5_encoder: width 32"):
        resolve_model_args(config)


def test_torchtitan_gets_a_copy_of_a_flavor():
    """It writes the widths of the configured encoders into what it is given."""
    flavors = get_train_spec("flux").model_args
    assert flavors["flux-tiny"] == flavors["flux-tiny"]
    assert flavors["flux-tiny"] is not flavors["flux-tiny"]


def test_torchtitans_own_names_are_understood(tmp_path):
    """custom_config_module and test_mode of torchtitan's files mean ours and the tiny encoders."""
    (tmp_path / "theirs.toml").write_text(
        '[job]\ncustom_config_module = "torchtitan.models.flux.job_config"\n'
        '[model]\nname = "flux"\nflavor = "flux-debug"\n'
        "[training]\ntest_mode = true\nimg_size = 256\nclassifier_free_guidance_prob = 0.447\n"
        '[encoder]\nt5_encoder = "google/t5-v1_1-xxl"\nmax_t5_encoding_len = 256\n'
        "[validation]\nenable = false\ndenoising_steps = 4\nsave_img_count = 1\n"
    )
    config = load_config(["--job.config_file", str(tmp_path / "theirs.toml")])
    assert config.encoder.t5_encoder == "assets/tiny/t5"
    assert config.flow.time_density == "uniform"


def test_relative_paths_start_at_the_callers_folder_then_the_repository(tmp_path, monkeypatch):
    from torchtitan_flux.paths import locate

    repository = Path.cwd()
    monkeypatch.chdir(tmp_path)
    assert os.path.samefile(locate("assets/tiny/t5"), repository / "assets/tiny/t5")
    (tmp_path / "assets/tiny/t5").mkdir(parents=True)
    assert os.path.samefile(locate("assets/tiny/t5"), tmp_path / "assets/tiny/t5")
    assert locate("assets/none") is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_says_only_what_differs_from_the_defaults(path):
    """And every key of it exists: the merged configuration takes it."""
    from torchtitan_flux.startup.load_config import read_config

    defaults = read_config([])
    with path.open("rb") as file:
        for section, keys in tomllib.load(file).items():
            for key, value in keys.items():
                assert hasattr(getattr(defaults, section), key), f"{section}.{key}"
                if not isinstance(value, dict):
                    same = getattr(getattr(defaults, section), key) == value
                    # the model's flavor is named in each file, also where it is the default
                    deliberate = (section, key) in CHOICES
                    assert not same or deliberate, f"{path.name}: {section}.{key} is the default"


CHOICES = {
    ("model", "flavor"),
    ("training", "dataset"),
    ("training", "max_norm"),
    ("training", "img_size"),
    ("training", "mixed_precision_param"),
    ("encoder", "max_t5_encoding_len"),
    ("parallelism", "data_parallel_shard_degree"),
    ("flow", "guidance"),
    ("metrics", "log_freq"),
    ("optimizer", "lr"),
}
"""Keys that a reader looks for: given although they equal the default."""
