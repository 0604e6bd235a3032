"""Captions from the TOML file to the tokens that training and validation read."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.startup.load_config import load_config
from torchtitan_flux.startup.model_args import resolve_model_args
from torchtitan_flux.training.conditioning import build_tokenizer
from torchtitan_flux.training.data import open_source, training_samples, validation_samples


@pytest.fixture
def configured(tmp_path: Path):
    """Two pictures, one of them with a caption, and a configuration with these keys of [data]."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in ("a", "red"), ("b", "blue"):
        Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("a square")

    def make(**data: str) -> FluxJobConfig:
        keys = {f"data.{name}": value for name, value in data.items()} | {
            "job.config_file": "train_configs/debug_model.toml",
            "job.dump_folder": str(tmp_path),
            "training.dataset": "folder",
            "training.dataset_path": str(folder),
            "validation.dataset": "folder",
            "validation.dataset_path": str(folder),
            "training.classifier_free_guidance_prob": "0",
        }
        return load_config([f"--{name}={value}" for name, value in keys.items()])

    return make


@pytest.mark.parametrize(
    ("data", "a", "b"),
    [
        ({}, "a square", None),
        ({"caption_prefix": "art: "}, "art: a square", None),
        ({"default_caption": "a picture"}, "a square", "a picture"),
        ({"default_caption": ""}, "a square", ""),
        ({"default_caption": "?", "caption_prefix": "art: "}, "art: a square", "art: ?"),
    ],
)
def test_captions_are_trained_and_validated_as_data_says(configured, data, a, b):
    config = configured(**data)
    tokenizer = build_tokenizer(config)
    args = resolve_model_args(config)
    training = training_samples(open_source(config, "train"), tokenizer, config, args, seed=1)
    validation = validation_samples(open_source(config, "held_out"), tokenizer, config)
    expected = {"a.png": a} | ({} if b is None else {"b.png": b})

    trained = {training.picture(p)[0].item_id: training[p] for p in range(2)}
    samples = {validation.source.index[i].item_id: validation[i] for i in range(2)}
    validated = {item: sample for item, sample in samples.items() if sample.weight}
    for of_items in trained, validated:
        assert of_items.keys() == expected.keys()
        for item, caption in expected.items():
            t5, clip = tokenizer(caption)
            assert torch.equal(of_items[item].text.t5, t5)
            assert torch.equal(of_items[item].text.clip, clip)


def test_every_rule_of_pictures_arrives(configured):
    config = configured(min_image_size="5", color_profiles="srgb")
    config.data.background = [1, 2, 3]
    tokenizer, args = build_tokenizer(config), resolve_model_args(config)
    for samples in (
        training_samples(open_source(config, "train"), tokenizer, config, args, seed=1),
        validation_samples(open_source(config, "held_out"), tokenizer, config),
    ):
        assert (samples.background, samples.min_size, samples.srgb) == ((1, 2, 3), 5, True)
