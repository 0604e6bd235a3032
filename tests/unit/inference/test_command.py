"""The command line of run_infer.sh, and the documented commands."""

import re
from pathlib import Path

import torchtitan_flux.engine  # noqa: F401  (before torchtitan)

import pytest
from documents import commands

from torchtitan_flux.checkpoint.manifest import MANIFEST
from torchtitan_flux.checkpoint.storage import METADATA
from torchtitan_flux.config.manager import ConfigError, load_config, read_config
from torchtitan_flux.config.resolve import resolve_model_args
from torchtitan_flux.generate import SampleSettings
from torchtitan_flux.inference.command import check_writable, parse, task_of
from torchtitan_flux.planning.command import model_args

REPO = Path(__file__).resolve().parents[3]
GUIDE = (REPO / "docs" / "inference.md").read_text(encoding="utf-8")
DIGITS = ["--job.config_file", "train_configs/flux_digits.toml"]


def task(*argv: str):
    options, rest = parse([*argv, *DIGITS])
    config = load_config(rest, training=False)
    return task_of(options, config, resolve_model_args(config), 1)


@pytest.mark.parametrize("command", commands("docs/inference.md"), ids=lambda c: c.text)
def test_documented_commands_are_understood(command, tmp_path, monkeypatch):
    """Every option is known, and every key of the configuration is."""
    assert set(command.environment) <= {"CONFIG_FILE", "NGPU"}
    config = command.environment.get("CONFIG_FILE")
    program = 1 if command.words[0] == "./run_infer.sh" else 3
    argv = command.words[program:]
    assert command.words[:program] in (
        ["./run_infer.sh"],
        ["python", "-m", "torchtitan_flux.infer"],
    )
    if "--from-png" in argv:
        with pytest.raises(ConfigError, match=r"seven\.png does not exist"):
            parse(argv)
        return
    options, rest = parse(argv)
    assert options.prompt or options.prompts
    if config is not None:
        rest = ["--job.config_file", config, *rest]
    read_config(rest)  # refuses keys that do not exist


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
        (("--prompt", "a", "--steps", "0"), "at least 1"),
        (("--prompt", "a", "--guidance", "2"), "takes no guidance"),
        (("--prompt", "a", "--prompt", "b", "--out", "c.png"), "2 pictures need a folder"),
        (("--prompt", "a", "--out", "c.jpg"), "--out c.jpg: pictures are PNG files"),
    ],
)
def test_what_cannot_be_asked_for_names_the_option(argv, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        task(*argv)


def test_memory_is_of_an_estimate():
    with pytest.raises(ConfigError, match="--estimate"):
        parse(["--prompt", "a", "--memory", "8"])


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
    return task_of(options, read, model_args(read), 1).settings


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


def test_only_what_is_surely_a_file_is_judged_by_its_name(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for out in (f"{tmp_path}/v1.5", f"{tmp_path}/v1.jpg/", f"{tmp_path}/folder.png"):
        (path,) = task("--prompt", "a", "--out", out).paths
        assert path == Path(out) / "0000-a.png"
    (path,) = task("--prompt", "a", "--inference.save_img_folder", "img.v1").paths
    assert path.parent.name == "img.v1"
    assert task("--prompt", "a", "--out", "b.PNG").paths == [Path("b.PNG")]


def test_what_cannot_be_written_is_known_before(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    for path in (plain / "x.png", plain / "deep" / "x.png", Path("/proc/seven.png")):
        with pytest.raises(ValueError, match=r"cannot be written \(.+\).* --out"):
            check_writable([path])
    check_writable([tmp_path / "new" / "deep" / "x.png"])
    assert list(tmp_path.iterdir()) == [plain], "nothing is left behind"
