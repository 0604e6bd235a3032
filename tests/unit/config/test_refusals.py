"""Every wrong input is refused with the one message of the table, and docs/errors.md says so."""

from pathlib import Path

import pytest
from unit.config.refusals import DOCUMENT, TABLE, Refusal, cells, lines_of, refused, reported

from torchtitan_flux.startup.load_config import ConfigError, load_config

ROWS = [row for rows in TABLE.values() for row in rows]
DIGITS = ["--job.config_file", "train_configs/flux_digits.toml"]


@pytest.mark.parametrize("case", ROWS, ids=lambda row: row.given.replace("\n", " "))
def test_a_wrong_input_is_one_message(case: Refusal, arguments, tmp_path):
    problems = reported(arguments(case))
    lines = lines_of(problems, tmp_path)
    expected = [problem.split(": ", 1) for problem in case.problems]
    assert [problem.key for problem in problems] == [key for key, _ in expected]
    assert all(part in line for line, (_, part) in zip(lines, expected, strict=True))
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"run.toml", *case.needs}, "nothing is written"
    row = cells(case, lines)
    documented = DOCUMENT.read_text(encoding="utf-8")
    assert case.varies or row in documented, "run python tests/unit/config/refusals.py"


def test_nothing_is_refused_without_a_mistake(arguments):
    """Nor are values of what is switched off."""
    argv = [
        *arguments(Refusal("")),
        *("--profiling.profile_freq", "0", "--activation_checkpoint.memory_budget", "2"),
        *("--parallelism.pipeline_parallel_first_stage_less_layers", "2"),
    ]
    assert load_config(argv).model.flavor == "flux-digits"


def said(argv: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(argv)
    return error.value.found


def assert_begin(lines: list[str], *beginnings: str) -> None:
    assert [line[: len(start)] for line, start in zip(lines, beginnings, strict=True)] == [
        *beginnings
    ]


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
    assert_begin(
        said(["--job.config_file", "seven.toml"]),
        "seven.toml:2: trainig: is an unknown section",
        'seven.toml:5: training.img_size = "8": must be',
        "seven.toml:7: training.local_batch_sise: is unknown",
        "seven.toml:11: optimizer.lr = [0.0001]: must be",
        "seven.toml:16: checkpoint.interval = 0: must be at least 1",
        'seven.toml:9: encoder.t5_encoder = "./nowhere": ./nowhere does not exist',
        "seven.toml:18: sampling.enable = true: needs sampling.prompts",
    )


def test_mistakes_of_file_and_command_line_come_together(arguments):
    argv = arguments(refused("training.steps = 0\noptimizer.lr = true"))
    assert_begin(
        said([*argv, "--training.flip", "1"]),
        "run.toml:2: optimizer.lr = true: ",
        "--training.flip: is unknown",
        "run.toml:1: training.steps = 0: ",
    )


def test_what_the_command_line_replaces_is_not_held_against_the_file(arguments):
    """But a file that is wrong is wrong."""
    argv = arguments(refused("training.steps = 0"))
    assert load_config([*argv, "--training.steps", "3"]).training.steps == 3
    Path("run.toml").write_text('training.steps = "0"\n')
    assert_begin(
        said([*DIGITS, *argv[2:], "--training.steps", "-3"]), "training.steps = -3: must be"
    )
    assert_begin(
        said([*argv, "--training.steps", "-3"])[:2],
        'run.toml:1: training.steps = "0": ',
        "training.steps = -3: ",
    )


def test_a_value_in_doubt_causes_no_second_message(arguments):
    """Its default would not go with the rest: 256 pixels and digits of 8."""
    case = refused("score.enable = true\ntraining.img_sise = 8\ntraining.img_size = true")
    assert len(said(arguments(case))) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parallelism.tensor_parallel_degree", "2"),
        ("parallelism.context_parallel_degree", "2"),
        ("parallelism.pipeline_parallel_degree", "2"),
        ("training.dtype", "float16"),
        ("training.img_size", "16"),  # with score.enable
        ("encoder.pixel_channels", "3"),
        ("validation.dataset", "coco-validation"),
        ("training.dataset", "cc12m-test"),
        ("training.dataset_path", "/nowhere"),
        ("data.max_unreadable_share", "2"),
        ("data.min_image_size", "0"),
        ("training.max_nonfinite_steps", "0"),
        ("sampling.freq", "0"),
        ("encoder.max_t5_encoding_len", "0"),
        ("checkpoint.initial_load_path", "./nowhere"),
        ("model.flavor", "flux-schnell"),
    ],
)
def test_what_does_not_go_with_the_shipped_digits_file_is_refused(key, value):
    related = {"model.flavor": "encoder.t5_encoder", "training.img_size": "score.enable",
               "encoder.pixel_channels": "score.enable", "training.dataset": "validation.enable",
               "parallelism.tensor_parallel_degree": "replicate_degree",
               "parallelism.context_parallel_degree": "replicate_degree",
               "parallelism.pipeline_parallel_degree": "replicate_degree",
               "validation.dataset": "validation.dataset_path"}.get(key, key)  # fmt: skip
    with pytest.raises(ConfigError, match=related):
        load_config([*DIGITS, f"--{key}", value])
