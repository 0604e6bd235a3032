"""What is to be drawn: prompts, settings and their sources, pictures that are repeated."""

from dataclasses import replace

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
from PIL import Image

from torchtitan_flux.checkpoint.manifest import MANIFEST
from torchtitan_flux.checkpoint.storage import METADATA
from torchtitan_flux.image_file import save_picture
from torchtitan_flux.inference.options import parse
from torchtitan_flux.inference.picture import NoPicture, Picture
from torchtitan_flux.inference.requested import requested
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.planning.command import model_args
from torchtitan_flux.sampling.generate import SampleSettings
from torchtitan_flux.startup.load_config import ConfigError, load_config, read_config
from torchtitan_flux.startup.model_args import resolve_model_args

NAMES = {"flavor": "flux-digits", "weights": "elsewhere", "t5": "/etc/passwd"}
DRAWN = Picture("a handwritten seven", "", SampleSettings(ImageSize(8, 8), 4, seed=9), 3, NAMES)
DIGITS = ["--job.config_file", "train_configs/flux_digits.toml"]


def pictures(*argv: str) -> list[Picture]:
    options, rest = parse([*argv, *DIGITS])
    config = load_config(rest, training=False)
    return requested(options, config, resolve_model_args(config))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--prompt", "a", "--prompts", "b.txt"), "captions in one way"),
        (("--prompts", "nowhere.txt"), "nowhere.txt does not exist"),
        (("--prompts", "train_configs"), "no text file"),
        (("--prompt", "a", "--size", "8by8"), "HEIGHTxWIDTH"),
        (("--prompt", "a", "--size", "9"), "not a positive multiple of 2"),
        (("--prompt", "a", "--size", "9x16"), r"--size 9x16: .*multiple of 2 "),
        (("--prompt", "a", "--size", "0"), r"--size 0: .*multiple of 2 "),
        (("--prompt", "a", "--size", "-8"), "HEIGHTxWIDTH"),
        (("--prompt", "a", "--inference.img_size", "9"), "by the configuration"),
        (("--prompt", "a", "--guidance", "2"), "takes no guidance"),
        (("--prompt", "a", "--negative", "b", "--cfg", "1"), "--negative needs classifier-free"),
    ],
)
def test_what_cannot_be_asked_for_names_the_option(argv, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pictures(*argv)


def test_the_extremes_of_what_can_be():
    for argv in (("--steps", "10000"), ("--cfg", "0"), ("--seed", "0"), ("--seed", str(10**400))):
        assert pictures("--prompt", "a", *argv)
    (one,) = pictures("--prompt", "a", "--negative", "b", "--cfg", "1.5")
    assert one.negative_prompt == "b"


def test_pictures_of_a_prompt_count_the_seed_up():
    found = pictures("--prompt", "a", "--prompt", "b", "--count", "2", "--seed", "7")
    addressed = [(one.prompt, one.index, one.settings.seed) for one in found]
    assert addressed == [("a", 0, 7), ("a", 0, 8), ("b", 1, 7), ("b", 1, 8)]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_prompts_of_a_file_are_its_lines(mark, tmp_path):
    """With Windows' line ends and mark; what looks like an end inside a caption is part of it."""
    captions = ["a red fox", "two\u2028lines", "next\x85line", "new\fpage", "ein Füchslein"]
    file = tmp_path / "prompts.txt"
    file.write_bytes(mark + "\r\n\r\n".join(captions).encode() + b" \n")
    found = pictures("--prompts", str(file), "--steps", "3")
    assert [(one.index, one.prompt) for one in found] == list(enumerate(captions))
    assert found[0].settings.steps == 3


def settings(*argv: str, config: str = "train_configs/flux_dev_model.toml") -> SampleSettings:
    """As on a machine that has none of the files."""
    options, rest = parse(["--prompt", "a", "--job.config_file", config, *argv])
    read = read_config(rest)
    return requested(options, read, model_args(read))[0].settings


WEIGHTS = ("--weights", "flux1-dev.safetensors")


@pytest.mark.parametrize(
    ("argv", "cfg", "guidance"),
    [
        ((), 5.0, 1.0),  # the run's own, as it draws while it trains
        (WEIGHTS, 1.0, 3.5),
        ((*WEIGHTS, "--cfg", "2"), 2.0, 3.5),
        ((*WEIGHTS, "--sampling.classifier-free-guidance-scale", "4"), 4.0, 3.5),
        ((*WEIGHTS, "--guidance", "2"), 1.0, 2.0),
        ((*WEIGHTS, "--sampling.guidance", "2.5"), 1.0, 2.5),
    ],
)
def test_published_weights_are_drawn_as_they_were_distilled(argv, cfg, guidance):
    found = settings(*argv)
    assert (found.cfg, found.guidance) == (cfg, guidance)


def test_published_weights_without_guidance_get_none():
    found = settings(*WEIGHTS, config="train_configs/flux_schnell_model.toml")
    assert (found.cfg, found.guidance) == (1.0, None)


@pytest.mark.parametrize("name", [METADATA, MANIFEST])
def test_a_checkpoint_of_a_run_is_drawn_as_the_run_draws(tmp_path, name):
    (tmp_path / name).touch()
    found = settings("--weights", str(tmp_path))
    assert (found.cfg, found.guidance) == (5.0, 1.0)
    (tmp_path / name).unlink()
    assert settings("--weights", str(tmp_path)).cfg == 1.0


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_picture_is_repeated_by_its_settings(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    save_picture(Image.new("L", (8, 8)), path, DRAWN.facts())
    assert Picture.read(path) == DRAWN
    assert pictures("--from-png", str(path)) == [replace(DRAWN, names={})]
    _, rest = parse(["--from-png", str(path), "--seed", "10", *DIGITS])
    assert rest == DIGITS, "nothing that a picture names is opened"
    (other,) = pictures("--from-png", str(path), "--seed", "10")
    other = replace(other, names={"weights": "mine", "flavor": "flux-digits"})
    assert list(DRAWN.differences(other)) == [
        "weights mine (the picture: elsewhere)",
        "seed 10 (the picture: 9)",
    ]
    with pytest.raises(ConfigError, match="--count 2: --from-png draws one picture"):
        parse(["--from-png", str(path), "--count", "2", *DIGITS])


@pytest.mark.parametrize("change", [{"cfg": float("nan")}, {"steps": 10**6}])
def test_a_picture_with_impossible_settings_is_refused_with_its_name(tmp_path, change):
    path, ((name, value),) = tmp_path / "a.png", change.items()
    recorded = replace(DRAWN, settings=replace(DRAWN.settings, **change))
    save_picture(Image.new("L", (8, 8)), path, recorded.facts())
    with pytest.raises(ValueError, match=f"--{name} {value} .by {path}"):
        pictures("--from-png", str(path))


def test_pictures_without_settings(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "foreign.png")
    (tmp_path / "text.png").write_text("x")
    cut = {k: v for k, v in DRAWN.facts().items() if k != "steps"}
    save_picture(Image.new("L", (8, 8)), tmp_path / "cut.png", cut)
    for name, message in {
        "foreign": "holds no settings", "text": "can be read", "cut": "steps", "no": "not exist",
    }.items():  # fmt: skip
        with pytest.raises(NoPicture, match=message):
            Picture.read(tmp_path / f"{name}.png")
        with pytest.raises(ConfigError, match=f"--from-png: .*{name}.png"):
            parse(["--from-png", str(tmp_path / f"{name}.png")])
