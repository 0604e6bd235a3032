"""A picture says how it was drawn, and what is no picture of ours is refused in one message."""

from dataclasses import fields, replace

import pytest
import torch
from PIL import Image, PngImagePlugin

from torchtitan_flux.image_file import FORMATS, save_picture
from torchtitan_flux.inference.picture_file import (
    SAMPLE,
    SAMPLES,
    NoPicture,
    Recorded,
    Source,
    digest,
)
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.sampling.generate import SampleSettings, to_pil
from torchtitan_flux.sampling.schedules import DEV, SCHNELL, Schedule

PLAIN = Recorded(
    prompt='a "red" circle\nabove — 円',
    negative_prompt="",
    settings=SampleSettings(ImageSize(48, 64), 7, 2.5, None, Schedule(3.0), 2**40 + 1),
    index=13,
    batch=4,
    row=3,
    flavor="flux-tiny",
    dtype="bfloat16",
    text_tokens=32,
    pixel_channels=3,
    step="700",
    own=True,
    weights=Source("outputs/a run/checkpoint/step-700", "00ff"),
    t5=Source("assets/tiny/t5", "01"),
    clip=Source("openai/clip-vit-large-patch14", ""),
    autoencoder=Source("ae.safetensors", "02"),
)
OTHER = replace(
    PLAIN,
    negative_prompt="blurred",
    settings=SampleSettings(ImageSize(16, 16), 1, 1.0, 3.5, DEV, 0),
    own=False,
    step="",
    weights=Source("flux1-dev.safetensors", "ab"),
    autoencoder=None,
)


def written(path, recorded: Recorded):
    image = to_pil(torch.zeros(3, 4, 4))
    save_picture(image, path, recorded.facts())
    return path


@pytest.mark.parametrize("recorded", [PLAIN, OTHER], ids=["own", "named"])
def test_everything_is_read_back(tmp_path, recorded):
    for suffix in FORMATS:
        assert Recorded.read(written(tmp_path / f"a{suffix}", recorded)) == recorded
    path = tmp_path / "a.png"
    with Image.open(path) as image:
        texts = image.text  # type: ignore[attr-defined]
    assert ("checkpoint" in texts) == recorded.own
    assert texts["software"] == "torchtitan-flux"


@pytest.mark.parametrize(("shifted", "schedule"), [(True, DEV), (False, SCHNELL)])
def test_pictures_from_before_there_were_other_schedules_are_read(tmp_path, shifted, schedule):
    path = written(tmp_path / "a.png", PLAIN)
    with Image.open(path) as image:
        texts = dict(image.text)  # type: ignore[attr-defined]
        del texts["schedule"]
        metadata = PngImagePlugin.PngInfo()
        for name, value in (texts | {"shifted": str(shifted)}).items():
            metadata.add_text(name, value)
        image.save(path, pnginfo=metadata)
    settings = replace(PLAIN.settings, schedule=schedule)
    assert Recorded.read(path) == replace(PLAIN, settings=settings)


def test_every_single_fact_is_needed(tmp_path):
    """A file that lost one is refused, and the message names the fact."""
    facts = {**PLAIN.facts(), "size": "48x64", "steps": 7, "cfg": 2.5, "guidance": None}
    facts |= {"schedule": "dev", "seed": 3}
    optional = {"software", "autoencoder", "autoencoder_digest"}
    assert len(facts) > len(fields(Recorded))
    for lost in set(facts) - optional:
        metadata = PngImagePlugin.PngInfo()
        for name, value in facts.items():
            if name != lost:
                metadata.add_text(name, str(value))
        to_pil(torch.zeros(1, 4, 4)).save(tmp_path / "b.png", pnginfo=metadata)
        wanted = lost.replace("checkpoint", "(weights|checkpoint)")
        with pytest.raises(NoPicture, match=wanted):
            Recorded.read(tmp_path / "b.png")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"row": 4}, "row 4 of a batch of 4"),
        ({"batch": "x"}, "invalid literal"),
        ({"batch": 10**9}, "row 3 of a batch of 1000000000"),
        ({"dtype": "", "schedule": "maybe"}, "maybe"),
    ],
)
def test_nonsense_is_refused(tmp_path, change, said):
    facts = {**PLAIN.facts(), **change}
    schedule = facts.pop("schedule", None)
    path = tmp_path / "a.png"
    save_picture(to_pil(torch.zeros(1, 4, 4)), path, facts)
    if schedule is not None:
        with Image.open(path) as image:
            texts = dict(image.text)  # type: ignore[attr-defined]
            metadata = PngImagePlugin.PngInfo()
            for name, value in (texts | {"schedule": schedule}).items():
                metadata.add_text(name, value)
            image.save(path, pnginfo=metadata)
    with pytest.raises(NoPicture, match=said):
        Recorded.read(path)


def test_foreign_files_are_refused(tmp_path):
    plain = tmp_path / "plain.png"
    Image.new("RGB", (4, 4)).save(plain)
    grid = tmp_path / "grid.png"
    save_picture(Image.new("L", (4, 4)), grid, {**PLAIN.settings.facts(), "step": 4})
    jpeg, gif = tmp_path / "named.png", tmp_path / "gif.png"
    Image.new("RGB", (4, 4)).save(jpeg, format="JPEG")
    Image.new("RGB", (4, 4)).save(gif, format="GIF")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(written(tmp_path / "whole.png", PLAIN).read_bytes()[:20])
    for path, said in {
        plain: "holds no settings",
        grid: "holds no settings",
        jpeg: "holds no settings",
        gif: "is a GIF; .* PNG, JPEG or WebP",
        text: "no picture that can be read",
        cut: "no picture that can be read",
        tmp_path / "nowhere.png": "does not exist",
    }.items():
        with pytest.raises(NoPicture, match=said) as refused:
            Recorded.read(path)
        assert str(path) in str(refused.value)


def test_a_digest_tells_files_apart(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(bytes(3 * SAMPLE))
    seen = {digest(path)}
    path.write_bytes(bytes(2 * SAMPLE) + b"\1" + bytes(SAMPLE - 1))  # small files: every byte
    seen.add(digest(path))
    path.write_bytes(bytes(3 * SAMPLE + 1))
    seen.add(digest(path))
    large = 2 * SAMPLES * SAMPLE
    path.write_bytes(bytes(large))
    seen.add(digest(path))
    path.write_bytes(bytes(large - 1) + b"\1")
    seen.add(digest(path))
    path.write_bytes(bytes(large // 2) + b"\1" * (large // 2))
    seen.add(digest(path))
    assert len(seen) == 6


def test_a_digest_of_a_folder_sees_weights_and_configurations(tmp_path):
    assert digest(tmp_path / "nowhere") == ""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    first = digest(tmp_path)
    (tmp_path / "README.md").write_text("no part of it")
    assert digest(tmp_path) == first
    (tmp_path / "config.json").write_text('{"layers": 2}')
    assert digest(tmp_path) != first
