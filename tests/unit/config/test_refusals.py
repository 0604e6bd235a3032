"""Every wrong input is refused with the one message of the table, and docs/errors.md says so."""

from pathlib import Path

import pytest
from unit.config.refusals import DOCUMENT, TABLE, Refusal, document

from torchtitan_flux.startup.load_config import ConfigError, load_config

REPO = f"{Path(__file__).resolve().parents[3]}/"
ROWS = [row for rows in TABLE.values() for row in rows]


def refused(argv: list[str]) -> list[str]:
    """What is said of a configuration, with the paths of this machine cut off."""
    with pytest.raises(ConfigError) as error:
        load_config(argv)
    return [line.replace(f"{Path.cwd()}/", "").replace(REPO, "") for line in error.value.found]


@pytest.mark.parametrize("case", ROWS, ids=lambda row: row.given.replace("\n", " "))
def test_a_wrong_input_is_one_message(case: Refusal, arguments):
    found = refused(arguments(case))
    assert len(found) == len(case.message)
    for said, expected in zip(found, case.message, strict=True):
        if expected.endswith(" …"):
            assert said.startswith(expected.removesuffix(" …"))
        else:
            assert said == expected
    left = {path.name for path in Path.cwd().iterdir()}
    assert left <= {"run.toml", *case.needs}, "nothing is written"


def test_nothing_is_refused_without_a_mistake(arguments):
    config = load_config(arguments(Refusal(())))
    assert config.model.flavor == "flux-digits"


def test_the_table_is_long_and_in_the_document():
    assert len(ROWS) >= 40
    assert DOCUMENT.read_text(encoding="utf-8") == document(), (
        f"run {document.__code__.co_filename}"
    )


def test_a_file_with_seven_mistakes_reports_seven(tmp_path, monkeypatch):
    """Of every kind: names, types, values, files, what does not go together."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seven.toml").write_text(
        "# a comment, so that lines are counted\n"
        "[trainig]\n"  # 1
        "steps = 3\n"
        "[training]\n"
        'img_size = "8"\n'  # 2
        'dataset = """digits"""\n'
        "local_batch_sise = 8\n"  # 3
        "[encoder]\n"
        't5_encoder = "./nowhere"\n'  # 4
        "[optimizer]\n"
        "lr = [\n"  # 5
        "  1e-4,  # ]\n"
        "]\n"
        "[checkpoint]\n"
        "enable = true\n"
        "interval = 0\n"  # 6
        "[sampling]\n"
        "enable = true\n"  # 7
    )
    assert refused(["--job.config_file", "seven.toml"]) == [
        "seven.toml:2: the section [trainig] is unknown; did you mean [training]?",
        'seven.toml:5: training.img_size = "8" must be a whole number, not a string',
        "seven.toml:7: training.local_batch_sise is unknown; did you mean "
        "training.local_batch_size?",
        "seven.toml:11: optimizer.lr = [0.0001] must be a number, not a list",
        "seven.toml:16: checkpoint.interval = 0 must be at least 1",
        "seven.toml:9: encoder.t5_encoder = './nowhere' does not exist",
        "seven.toml:18: sampling.enable = true needs sampling.prompts, a list of captions",
    ]


def test_mistakes_of_file_and_command_line_come_together(arguments):
    case = Refusal(
        (), toml="training.steps = 0\noptimizer.lr = true", argv=("--training.flip", "1")
    )
    assert refused(arguments(case)) == [
        "run.toml:2: optimizer.lr = true must be a number, not a boolean",
        "--training.flip is unknown; did you mean training.flip_prob?",
        "run.toml:1: training.steps = 0 must be at least 1",
    ]


def test_what_the_command_line_replaces_is_not_held_against_the_file(arguments):
    """But a file that is wrong is wrong."""
    case = Refusal((), toml="training.steps = 0", argv=("--training.steps", "3"))
    assert load_config(arguments(case)).training.steps == 3
    case = Refusal((), toml='training.steps = "0"', argv=("--training.steps", "-3"))
    assert refused(arguments(case)) == [
        'run.toml:1: training.steps = "0" must be a whole number, not a string',
        "training.steps = -3 must be at least 1",
    ]


def test_a_value_in_doubt_causes_no_second_message(arguments):
    """Its default would not go with the rest: 256 pixels and digits of 8."""
    case = Refusal((), toml="score.enable = true\ntraining.img_sise = 8\ntraining.img_size = true")
    assert len(refused(arguments(case))) == 2
