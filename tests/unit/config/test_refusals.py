"""Every wrong input is refused as docs/errors.md says."""

from pathlib import Path

import pytest
from unit.config.refusals import DOCUMENT, FILES, TABLE, row

from torchtitan_flux.startup.load_config import ConfigError, load_config

DIGITS = ["--job.config_file", "train_configs/flux_digits.toml"]


@pytest.mark.parametrize("given", [given for rows in TABLE.values() for given in rows])
def test_a_wrong_input_is_refused_as_documented(given, arguments, tmp_path):
    said = row(given, arguments(given), tmp_path)
    assert not said.endswith("|  |"), "nothing is wrong with it"
    documented = DOCUMENT.read_text(encoding="utf-8")
    assert said in documented, "run python tests/unit/config/refusals.py"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"run.toml", "folder", *FILES}, "nothing is written"


def said(argv: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(argv)
    return error.value.found


def assert_begin(lines: list[str], *beginnings: str) -> None:
    assert [line[: len(start)] for line, start in zip(lines, beginnings, strict=True)] == [
        *beginnings
    ]


def test_a_file_with_seven_mistakes_reports_seven_and_those_of_the_command_line(arguments):
    """Of every kind: names, types, values, files, what does not go together."""
    argv = arguments("")
    Path("run.toml").write_text(
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
    assert_begin(
        said([*argv, "--training.flip", "1"]),
        "run.toml:2: trainig: is an unknown section",
        'run.toml:5: training.img_size = "8": must be',
        "run.toml:7: training.local_batch_sise: is unknown",
        "run.toml:11: optimizer.lr = [0.0001]: must be",
        "--training.flip: is unknown",
        "run.toml:16: checkpoint.interval = 0: must be a number from 1",
        'run.toml:9: encoder.t5_encoder = "./nowhere": ./nowhere does not exist',
        "run.toml:18: sampling.enable = true: needs sampling.prompts",
    )


def test_what_the_command_line_replaces_is_not_held_against_the_file(arguments):
    """But a file that is wrong is wrong."""
    argv = arguments("training.steps = 0")
    assert load_config([*argv, "--training.steps", "3"]).training.steps == 3
    Path("run.toml").write_text('training.steps = "0"\n')
    assert_begin(
        said([*argv, "--training.steps", "-3"])[:2],
        'run.toml:1: training.steps = "0": ',
        "training.steps = -3: ",
    )


def test_a_value_in_doubt_causes_no_second_message(arguments):
    """Its default would not go with the rest: 256 pixels and digits of 8."""
    given = "score.enable = true\ntraining.img_sise = 8\ntraining.img_size = true"
    assert len(said(arguments(given))) == 2


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("parallelism.tensor_parallel_degree", "2", "replicate_degree"),
        ("training.img_size", "16", "score.enable"),
        ("encoder.pixel_channels", "3", "score.enable"),
        ("validation.dataset", "coco-validation", "validation.dataset_path"),
        ("training.dataset", "cc12m-test", "validation.enable"),
        ("training.dataset_path", "/nowhere", "training.dataset_path"),
        ("model.flavor", "flux-schnell", "encoder.t5_encoder"),
    ],
)
def test_what_does_not_go_with_the_shipped_digits_file_is_refused(key, value, named):
    with pytest.raises(ConfigError, match=named):
        load_config([*DIGITS, f"--{key}", value])
