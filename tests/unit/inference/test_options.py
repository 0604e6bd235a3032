"""The options of run_infer.sh: documented, in range, known; what pipelines bring."""

import re
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest

from torchtitan_flux.config.problems import ConfigError
from torchtitan_flux.inference.options import parse

REPO = Path(__file__).resolve().parents[3]


def test_every_option_is_in_the_guide(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    options = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    guide = (REPO / "docs" / "inference.md").read_text(encoding="utf-8")
    table = set(re.findall(r"^\| `(--[\w-]+)", guide, re.MULTILINE))
    assert options - {"--help", "--section", "--low-memory"} == table


@pytest.mark.parametrize(
    ("option", "invalid"),
    [
        *(("steps", "0"), ("count", "-1"), ("seed", "-1"), ("cfg", "nan"), ("cfg", "inf")),
        *(("guidance", "-0.5"), ("prompts", "b.txt"), ("ema", "0.9")),
    ],
)
def test_what_can_never_be_drawn_with_is_refused_at_once(option, invalid):
    with pytest.raises(ConfigError, match=f"--{option}"):
        parse(["--prompt", "a", "--weights", "b", f"--{option}", invalid])


def test_all_problems_are_in_one_message():
    with pytest.raises(ConfigError) as refused:
        parse(["--cfg", "nan", "--steps", "0", "--from-png", "a.png", "--count", "2"])
    assert len(refused.value.found) == 3


def test_a_pipeline_brings_its_encoders(tmp_path):
    (tmp_path / "vae").mkdir()
    assert parse(["--weights", str(tmp_path), "--a.b", "c"])[1] == ["--a.b", "c"]
    (tmp_path / "model_index.json").write_text("{}")
    expected = ["--a.b", "c", "--encoder.autoencoder_path", str(tmp_path / "vae")]
    assert parse(["--weights", str(tmp_path), "--a.b", "c"])[1] == expected
    given = ["--encoder.autoencoder_path", "mine"]
    assert parse(["--weights", str(tmp_path), *given])[1] == given
