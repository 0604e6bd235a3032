"""The tiny encoders: reproducible, small, in the real formats, and of use."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from torchtitan_flux.encoders.autoencoder import autoencoder_geometry, load_autoencoder
from torchtitan_flux.encoders.text import ClipEncoder, T5Encoder
from torchtitan_flux.encoders.tokenizer import CaptionTokenizer

ROOT = Path(__file__).parents[3]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def test_written_again_byte_for_byte(tiny: Path, tmp_path: Path):
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_tiny_assets.py", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    files = {file.relative_to(tiny) for file in tiny.rglob("*") if file.is_file()}
    assert {file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()} == files
    for file in files:
        assert (tmp_path / file).read_bytes() == (tiny / file).read_bytes(), file
    assert sum(file.stat().st_size for file in tiny.rglob("*")) < 1_900_000


@pytest.fixture(scope="module")
def digit_tokens(tiny: Path) -> tuple[torch.Tensor, torch.Tensor]:
    tokenizer = CaptionTokenizer(tiny / "t5", tiny / "clip", 64)
    t5, clip = zip(*(tokenizer(f"a handwritten {digit}") for digit in DIGITS), strict=True)
    return torch.stack(t5), torch.stack(clip)


def closest(features: torch.Tensor) -> float:
    """Smallest distance of two rows, in units of the features' RMS."""
    rms = features.square().mean().sqrt()
    pairs = itertools.combinations(features, 2)
    return min(((a - b).square().mean().sqrt() / rms).item() for a, b in pairs)


def test_digits_have_distinct_features(tiny: Path, digit_tokens):
    t5, clip = digit_tokens
    features, pooled = T5Encoder(tiny / "t5")(t5), ClipEncoder(tiny / "clip")(clip)
    for values in (features, pooled):
        assert values.square().mean().sqrt().item() == pytest.approx(1.0, rel=0.05)
    differing = (t5 != t5[0]).any(0).nonzero().item()  # the one place that tells them apart
    assert closest(features[:, differing]) > 0.9
    assert closest(pooled) > 0.3


def test_words_of_the_captions_are_single_tokens(tiny: Path):
    words = (
        "a the of on in at with and handwritten digit photo picture image background red green "
        "blue yellow orange purple black white grey circle square triangle star cross ring small "
        "large tiny big top bottom left right centre upper lower middle"
    )
    t5, clip = (AutoTokenizer.from_pretrained(tiny / kind) for kind in ("t5", "clip"))
    for word in (*words.split(), *DIGITS):
        assert len(t5(word).input_ids) == 2, word
        assert len(clip(word).input_ids) == 3, word


def smooth_images() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    coarse = torch.randn(3, 3, 8, 12, generator=rng)
    return torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bicubic").clamp(-1, 1)


def test_latents_are_of_unit_size(tiny: Path):
    autoencoder = load_autoencoder(tiny / "ae.safetensors")
    assert autoencoder_geometry(tiny / "ae.safetensors") == (16, 8)
    latents = autoencoder.encode(smooth_images())
    assert latents.shape == (3, 16, 8, 12)
    assert latents.std().item() == pytest.approx(1.0, abs=0.1)
    assert latents.mean().abs() < 0.1
    sampled = autoencoder.encode(smooth_images(), torch.ones_like(latents))
    assert 0.001 < (sampled - latents).mean() < 0.1
    decoded = autoencoder.decode(latents)
    assert decoded.shape == (3, 3, 64, 96)
    assert decoded.isfinite().all()
    assert 0.1 < decoded.std() < 1.0


def test_both_files_of_the_autoencoder_are_the_same(tiny: Path):
    ours, again = load_autoencoder(tiny / "ae.safetensors"), load_autoencoder(tiny / "vae")
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert ours.args == again.args
