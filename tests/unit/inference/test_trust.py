"""What a picture names is opened where the configuration or the command line names it as well."""

from dataclasses import replace
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
from PIL import Image
from unit.inference.recorded import DRAWN

from torchtitan_flux.image_file import save_picture
from torchtitan_flux.inference import picture_file
from torchtitan_flux.inference.command import parse
from torchtitan_flux.inference.picture_file import Source
from torchtitan_flux.inference.trust import foreign_files
from torchtitan_flux.startup.load_config import ConfigError, read_config

DIGITS = ["--job.config_file", "train_configs/flux_digits.toml"]
CONFIG = read_config(DIGITS)


def test_the_runs_own_files_are_known():
    assert foreign_files(DRAWN, CONFIG, ()) == []
    for same in (
        replace(DRAWN, t5=Source(str(Path("assets/tiny/t5").resolve()), "")),
        replace(DRAWN, t5=Source("torchtitan_flux/../assets/tiny/t5", "")),
    ):
        assert foreign_files(same, CONFIG, ()) == []


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"weights": Source("/mnt/other/checkpoint/step-600", "0")}, "--weights /mnt/other"),
        ({"weights": Source("outputs/flux_digits/checkpoint/x", "0")}, "--weights outputs"),
        ({"weights": Source("outputs/flux_digits/checkpoint/../step-1", "0")}, "--weights outputs"),
        ({"t5": Source("evil/t5", "")}, "--encoder.t5_encoder evil/t5"),
        ({"clip": Source("/etc", "")}, "--encoder.clip_encoder /etc"),
        ({"autoencoder": Source("/etc/passwd", "")}, "--encoder.autoencoder_path /etc/passwd"),
    ],
)
def test_others_are_named_unless_the_command_line_names_that_part(change, option):
    recorded = replace(DRAWN, **change)
    (found,) = foreign_files(recorded, CONFIG, ())
    assert found.startswith(option)
    assert foreign_files(recorded, CONFIG, {option.split()[0]}) == []


def test_a_strangers_picture_opens_nothing_until_it_is_trusted(tmp_path, monkeypatch):
    """Not even to look whether a file is what it was."""
    strange = replace(DRAWN, t5=Source("evil/t5", ""), weights=Source(str(tmp_path), "0"))
    path = tmp_path / "a.jpg"
    save_picture(Image.new("L", (8, 8)), path, strange.facts())
    monkeypatch.setattr(picture_file, "digest", None)
    with pytest.raises(ConfigError) as refused:
        parse(["--from-png", str(path), *DIGITS])
    (line,) = refused.value.found
    for part in (f"--weights {tmp_path}", "--encoder.t5_encoder evil/t5", "--trust"):
        assert part in line
    options, rest = parse(["--from-png", str(path), "--trust", *DIGITS])
    assert options.trusted == [f"--weights {tmp_path}", "--encoder.t5_encoder evil/t5"]
    assert rest[rest.index("--encoder.t5_encoder") + 1] == "evil/t5"
    more = ["--weights", "mine.safetensors", "--encoder.t5_encoder", "mine"]
    options, rest = parse(["--from-png", str(path), *more, *DIGITS])
    assert options.weights == "mine.safetensors"
    assert "evil/t5" not in rest


def test_the_parts_of_a_pipeline_that_is_named_are_known(tmp_path):
    """They come with --weights, as without a picture."""
    (tmp_path / "model_index.json").touch()
    for part in ("text_encoder", "text_encoder_2"):
        (tmp_path / part).mkdir()
    recorded = replace(
        DRAWN,
        own=False,
        weights=Source(str(tmp_path), "0"),
        t5=Source(str(tmp_path / "text_encoder_2"), ""),
        clip=Source(str(tmp_path / "text_encoder"), ""),
    )
    path = tmp_path / "a.webp"
    save_picture(Image.new("L", (8, 8)), path, recorded.facts())
    with pytest.raises(ConfigError, match=r"--weights .*--encoder.t5.*--encoder.clip"):
        parse(["--from-png", str(path), *DIGITS])
    options, _ = parse(["--from-png", str(path), "--weights", str(tmp_path), *DIGITS])
    assert options.recorded == recorded
