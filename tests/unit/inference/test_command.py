"""The command line of run_infer.sh, and the documented commands."""

import re
from pathlib import Path

import torchtitan_flux.engine  # noqa: F401  (before torchtitan)

import pytest
from documents import commands

from torchtitan_flux.config.manager import ConfigError, load_config, read_config
from torchtitan_flux.config.resolve import resolve_model_args
from torchtitan_flux.inference.command import parse, task_of

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
        (("--prompt", "a", "--out", "c.jpg"), "pictures are PNG files"),
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
