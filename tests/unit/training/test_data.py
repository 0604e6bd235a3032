"""Captions from the TOML file to the tokens that training and validation read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from torchtitan_flux.encoders.tokenizer import CaptionTokenizer
from torchtitan_flux.paths import resolved_path
from torchtitan_flux.startup.load_config import load_config
from torchtitan_flux.startup.model_args import resolve_model_args
from torchtitan_flux.training.data import open_source, training_samples, validation_samples

TOML = """
[job]
custom_config_module = "torchtitan_flux.config.job_config"
[experimental]
custom_import = "torchtitan_flux.training.train_spec"
[model]
name = "flux"
flavor = "flux-tiny"
[encoder]
t5_encoder = "assets/tiny/t5"
clip_encoder = "assets/tiny/clip"
autoencoder_path = "assets/tiny/ae.safetensors"
max_t5_encoding_len = 32
[training]
dataset = "folder"
dataset_path = "{folder}"
img_size = 64
classifier_free_guidance_prob = 0.0
[validation]
enable = true
dataset_path = "{folder}"
[data]
{data}
"""


@pytest.fixture
def configured(tmp_path: Path):
    """Two pictures, one of them with a caption, and a configuration with these keys of [data]."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64), "red" if name == "a" else "blue").save(folder / f"{name}.png")
    (folder / "a.txt").write_text("a square")

    def make(*data: str) -> Any:
        toml = tmp_path / "run.toml"
        toml.write_text(TOML.format(folder=folder, data="\n".join(data)))
        return load_config(["--job.config_file", str(toml), "--job.dump_folder", str(tmp_path)])

    return make


@pytest.mark.parametrize(
    ("data", "a", "b"),
    [
        ([], "a square", None),
        (['caption_prefix = "art: "'], "art: a square", None),
        (['default_caption = "a picture"'], "a square", "a picture"),
        (['default_caption = ""'], "a square", ""),
        (['default_caption = "?"', 'caption_prefix = "art: "'], "art: a square", "art: ?"),
    ],
)
def test_captions_are_trained_and_validated_as_data_says(configured, data, a, b):
    config = configured(*data)
    encoder = config.encoder
    t5_path, clip_path = map(resolved_path, (encoder.t5_encoder, encoder.clip_encoder))
    tokenizer = CaptionTokenizer(t5_path, clip_path, encoder.max_t5_encoding_len)

    source = open_source(config, "train")
    training = training_samples(source, tokenizer, config, resolve_model_args(config), seed=1)
    validation = validation_samples(open_source(config, "held_out"), tokenizer, config)
    seen = {"training": {}, "validation": {}}
    for position in range(2):
        item, *_ = training.picture(position)
        seen["training"][item.item_id] = training[position]
    for index in range(2):
        sample = validation[index]
        if sample.weight:
            seen["validation"][validation.source[index].item_id] = sample
    expected = {"a.png": a} | ({} if b is None else {"b.png": b})
    for where, samples in seen.items():
        assert samples.keys() == expected.keys(), where
        for item, caption in expected.items():
            t5, clip = tokenizer(caption)
            assert torch.equal(samples[item].text.t5, t5), (where, item)
            assert torch.equal(samples[item].text.clip, clip), (where, item)
