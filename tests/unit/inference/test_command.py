"""The command line of run_infer.sh, and the documented commands."""

import re
from dataclasses import replace
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
from PIL import Image

from torchtitan_flux.checkpoint.manifest import MANIFEST
from torchtitan_flux.checkpoint.storage import METADATA
from torchtitan_flux.image_file import save_picture
from torchtitan_flux.inference.command import changed, parse, task_of
from torchtitan_flux.inference.picture_settings import NoPicture, PictureSettings
from torchtitan_flux.latents import ImageSize
from torchtitan_flux.planning.command import model_args
from torchtitan_flux.sampling.generate import SampleSettings
from torchtitan_flux.startup.load_config import ConfigError, load_config, read_config
from torchtitan_flux.startup.model_args import resolve_model_args

REPO = Path(__file__).resolve().parents[3]
GUIDE = (REPO / "docs" / "inference.md").read_text(encoding="utf-8")
NAMES = {"flavor": "flux-digits", "weights": "elsewhere", "t5": "/etc/passwd"}
DRAWN = PictureSettings(
    "a handwritten seven", "", SampleSettings(ImageSize(8, 8), 4, seed=9), 3, NAMES
)
DIGITS = ["--job.config_file", "train_configs/flux_digits.toml"]


def task(*argv: str):
    options, rest = parse([*argv, *DIGITS])
    config = load_config(rest, training=False)
    return task_of(options, config, resolve_model_args(config))


def test_every_option_is_in_the_guide(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    options = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    table = set(re.findall(r"^\| `(--[\w-]+)", GUIDE, re.MULTILINE))
    assert options - {"--help", "--section", "--low-memory"} == table


def test_a_negative_caption_needs_guidance():
    with pytest.raises(ValueError, match="--negative needs classifier-free guidance"):
        task("--prompt", "a", "--negative", "b", "--cfg", "1")
    assert task("--prompt", "a", "--negative", "b", "--cfg", "1.5").negative == "b"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--prompt", "a", "--prompts", "b.txt"), "captions in one way"),
        (("--prompts", "nowhere.txt"), "nowhere.txt does not exist"),
        (("--prompts", "train_configs"), "no text file"),
        (("--prompt", "a", "--size", "8by8"), "HEIGHTxWIDTH"),
        (("--prompt", "a", "--size", "9"), "not a positive multiple of 2"),
        (("--prompt", "a", "--size", "9x16"), r"--size 9x16: .*nearest: 8x16, 10x16$"),
        (("--prompt", "a", "--size", "0"), r"--size 0: .*nearest: 2x2$"),
        (("--prompt", "a", "--size", "70000"), "--size 70000: at most 65536 pixels a side"),
        (("--prompt", "a", "--size", "-8"), "HEIGHTxWIDTH"),
        (("--prompt", "a", "--size", "nan"), "HEIGHTxWIDTH"),
        (("--prompt", "a", "--size", ""), "--size is empty"),
        (("--prompt", "a", "--inference.img_size", "9"), "by the configuration.*nearest: 8x8"),
        (("--prompt", "a", "--out", ""), "--out is empty"),
        (("--prompts", ""), "--prompts is empty"),
        (("--prompt", "a\udcff"), "not written in UTF-8"),
        (("--prompt", "a", "--steps", "0"), "at least 1"),
        (("--prompt", "a", "--guidance", "2"), "takes no guidance"),
    ],
)
def test_what_cannot_be_asked_for_names_the_option(argv, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        task(*argv)


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("steps", ("0", "-3", "10001", "99999999999999")),
        ("count", ("0", "-1", "10001")),
        ("cfg", ("nan", "inf", "-1")),
        ("guidance", ("nan", "inf", "-0.5")),
        ("seed", ("-2",)),
    ],
)
def test_numbers_that_can_never_be_are_refused_before_anything_starts(option, wrong):
    for value in wrong:
        argv = ["--prompt", "a", f"--{option}", value]
        with pytest.raises(ConfigError, match=f"--{option} {value}"):
            parse(argv)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as refused:
        parse(["--prompt", "a", "--cfg", "nan", "--steps", "0", "--height", "512", "--sed", "3"])
    assert len(refused.value.found) == 4


def test_the_edges_of_what_can_be():
    for argv in (("--steps", "10000"), ("--cfg", "0"), ("--seed", "0"), ("--seed", str(10**400))):
        assert task("--prompt", "a", *argv)


def test_a_picture_with_impossible_settings_is_refused_with_its_name(tmp_path):
    for change, said in (
        ({"cfg": float("nan")}, "--cfg nan"),
        ({"steps": 10**6}, "--steps 1000000"),
    ):
        path = tmp_path / "a.png"
        recorded = replace(DRAWN, settings=replace(DRAWN.settings, **change))
        save_picture(Image.new("L", (8, 8)), path, recorded.facts())
        with pytest.raises(ValueError, match=f"{said} .by {path}"):
            task("--from-png", str(path))


def test_options_of_other_programs_point_to_what_does_it():
    for given, meant in {
        "--height": "--size HEIGHTxWIDTH",
        "--width": "--size HEIGHTxWIDTH",
        "--num_images": "--count N",
        "--num-images-per-prompt": "--count N",
        "--num_inference_steps": "--steps",
        "--guidance_scale": "--cfg",
        "--negative_prompt": "--negative",
        "--output": "--out",
        "--from_png": "did you mean --from-png",
        "--promt": "did you mean --prompt",
        "--xyzzy": "--help lists",
    }.items():
        with pytest.raises(ConfigError, match=f"{given.replace('-', '.')} is unknown: .*{meant}"):
            parse(["--prompt", "a", given, "8"])


def test_pictures_of_a_prompt_count_the_seed_up():
    found = task("--prompt", "a", "--prompt", "b", "--count", "2", "--seed", "7")
    assert [(r.prompt, r.index, r.again) for r in found.requests] == [
        ("a", 0, 0),
        ("a", 0, 1),
        ("b", 1, 0),
        ("b", 1, 1),
    ]
    assert found.settings.seed == 7


def test_a_picture_is_not_counted(tmp_path):
    save_picture(Image.new("L", (8, 8)), tmp_path / "a.png", DRAWN.facts())
    with pytest.raises(ConfigError, match="--count 2: --from-png draws one picture"):
        parse(["--from-png", str(tmp_path / "a.png"), "--count", "2", *DIGITS])


def test_prompts_of_a_file_are_its_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red fox\n\n  ein Füchslein \n", encoding="utf-8")
    found = task("--prompts", str(file), "--out", str(tmp_path), "--steps", "3")
    assert [one.prompt for one in found.requests] == ["a red fox", "ein Füchslein"]
    assert [one.index for one in found.requests] == [0, 1]
    assert [path.name for path in found.paths] == ["0000-a-red-fox.png", "0001-ein-füchslein.png"]
    assert found.settings.steps == 3


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_of_a_prompts_file_end_where_an_editor_ends_them(mark, tmp_path):
    """With Windows' line ends and mark; what looks like an end inside a caption is part of it."""
    captions = ["a red fox", "two\u2028lines", "next\x85line", "new\fpage"]
    file = tmp_path / "prompts.txt"
    file.write_bytes(mark + "\r\n".join(captions).encode())
    assert [one.prompt for one in task("--prompts", str(file)).requests] == captions


def settings(*argv: str, config: str = "train_configs/flux_dev_model.toml") -> SampleSettings:
    """As on a machine that has none of the files."""
    options, rest = parse(["--prompt", "a", "--job.config_file", config, *argv])
    read = read_config(rest)
    return task_of(options, read, model_args(read)).settings


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
def test_a_picture_says_how_it_was_drawn(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    save_picture(Image.new("L", (8, 8)), path, DRAWN.facts())
    assert PictureSettings.read(path) == DRAWN
    found = task("--from-png", str(path))
    assert found.settings == DRAWN.settings
    assert [(r.prompt, r.index) for r in found.requests] == [(DRAWN.prompt, 3)]
    options, rest = parse(["--from-png", str(path), "--seed", "10", *DIGITS])
    assert rest == DIGITS, "nothing that a picture names is opened"
    config = load_config(rest, training=False)
    lines = changed(options, task_of(options, config, resolve_model_args(config)))
    assert lines == ["--seed 10 (the picture: 9)"]
    assert list(DRAWN.differences({"weights": "mine", "flavor": "flux-digits"})) == [
        "weights mine (the picture: elsewhere)"
    ]


def test_pictures_that_say_nothing(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "foreign.png")
    (tmp_path / "text.png").write_text("x")
    cut = {k: v for k, v in DRAWN.facts().items() if k != "steps"}
    save_picture(Image.new("L", (8, 8)), tmp_path / "cut.png", cut)
    for name, said in {
        "foreign": "holds no settings", "text": "can be read", "cut": "steps", "no": "not exist",
    }.items():  # fmt: skip
        with pytest.raises(NoPicture, match=said):
            PictureSettings.read(tmp_path / f"{name}.png")
        with pytest.raises(ConfigError, match=f"--from-png: .*{name}.png"):
            parse(["--from-png", str(tmp_path / f"{name}.png")])
