"""Reading: what files and command lines mean, what is printed and written, what is documented."""

import logging
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import tomli

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.meanings import MEANINGS
from torchtitan_flux.config.reference import as_toml
from torchtitan_flux.config.schema import get, keys_of
from torchtitan_flux.config.toml_file import read_toml
from torchtitan_flux.config.values import from_text, from_toml
from torchtitan_flux.paths import locate
from torchtitan_flux.startup.dump_config import log_resolved
from torchtitan_flux.startup.load_config import (
    ConfigError,
    load_config,
    read,
    read_config,
)

REPO = Path(__file__).resolve().parents[3]
KEYS = {key.name: key for key in keys_of(FluxJobConfig)}
DIGITS = ["--job.config_file", "train_configs/flux_digits.toml"]


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        ("--training.steps=3 --training.steps=3", "training.steps", 3),
        ("--training.steps 30_000", "training.steps", 30_000),
        ("--training.local-batch-size 3", "training.local_batch_size", 3),
        ("--training.steps 3 --training.steps 4", "training.steps", 4),
        ("--checkpoint.enable", "checkpoint.enable", True),
        ("--checkpoint.no-enable", "checkpoint.enable", False),
        ("--checkpoint.no_enable", "checkpoint.enable", False),
        ("--checkpoint.enable=true", "checkpoint.enable", True),
        ("--checkpoint.no-initial-load-model-only", "checkpoint.initial_load_model_only", False),
        ("--optimizer.lr 1e-4", "optimizer.lr", 1e-4),
        ("--compile.components model,loss", "compile.components", ["model", "loss"]),
        ("--training.max_norm 2", "training.max_norm", 2.0),
        ("--checkpoint.load_step -1", "checkpoint.load_step", -1),
        ("--quantize.linear.float8.emulate", "quantize.linear.float8.emulate", True),
        ("--encoder.pixel_channels 3", "encoder.pixel_channels", 3),
        ("--sampling.prompts one,two", "sampling.prompts", ["one", "two"]),
        ("--sampling.prompts one, two", "sampling.prompts", ["one,", "two"]),
        ('--sampling.prompts ["one","a,b"]', "sampling.prompts", ["one", "a,b"]),
        ("--data.background 1,2,3", "data.background", [1, 2, 3]),
        ("--model.converters=", "model.converters", []),
        ("--debug.seed 7", "debug.seed", 7),
        ("--debug.seed None", "debug.seed", None),
        (
            "--parallelism.module_fqns_per_model_part a,b c",
            "parallelism.module_fqns_per_model_part",
            [["a", "b"], ["c"]],
        ),
    ],
)
def test_forms_of_the_command_line(argv, key, value):
    reading = read(argv.split(" "))
    assert reading.problems == []
    found = get(reading.config, key)
    assert (found, type(found)) == (value, type(value))
    assert key in reading.given


def test_every_default_is_of_its_own_type_and_can_be_typed():
    """What is written can be read: from TOML for all keys, from text for simple ones."""
    for key in KEYS.values():
        if key.default is not None:
            assert from_toml(key.default, key.annotation) == key.default, key.name
        if isinstance(key.default, int | float | str):
            assert from_text([str(key.default)], key.annotation) == key.default, key.name


def test_lines_of_keys(tmp_path):
    (tmp_path / "a.toml").write_text(
        'title = "a # b"  # [no.table]\n'
        "[ a . 'b' ] # comment\n"
        "list = [\n  1, # ]\n  [2, '#'],\n]\n"
        "in.side = { x = 1, y = '}' }\n"
        "\n\n'quoted' = '''\n'\n'''\n"
        "last=2"
    )
    file = read_toml(tmp_path / "a.toml")
    lines = {
        "title": 1,
        "a.b": 2,
        "a.b.list": 3,
        "a.b.in.side": 7,
        "a.b.quoted": 10,
        "a.b.last": 13,
    }
    assert file.lines == lines
    assert file.where("a.b.in.side.x") == "a.toml:7"
    assert file.where("a") == "a.toml:2"


@pytest.mark.parametrize("name", ["flux_digits", "debug_model", "flux_mnist"])
def test_the_resolved_file_gives_the_configuration_again(name, tmp_path):
    argv = [
        "--job.config_file", f"train_configs/{name}.toml",
        "--job.dump_folder", str(tmp_path),
        "--job.description", 'quotes " \\ and\nlines, ünïcode \x01',
        "--lr_scheduler.decay_ratio", "None",
        "--training.max_norm", "inf",
        "--debug.seed", "5",
    ]  # fmt: skip
    config = load_config(argv)
    log_resolved(config)
    again = load_config(["--job.config_file", str(tmp_path / "config.toml")])
    again.job.config_file = config.job.config_file
    assert asdict(again) == asdict(config)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]
    config.job.dump_folder, config.job.save_config_file = str(tmp_path / "none"), None
    log_resolved(config)
    assert not (tmp_path / "none").exists()


def test_every_key_has_a_meaning():
    assert [name for name, key in KEYS.items() if not key.meaning] == []
    assert set(MEANINGS) <= set(KEYS), "a meaning of a key that is gone"


def test_the_description_of_all_keys_is_a_configuration_file():
    text = as_toml(FluxJobConfig(), described=True)
    assert "'joint'])\ncaption_dropout = \"independent\"" in text
    assert all(f"{name.rpartition('.')[2]} = " in text for name in KEYS)
    assert tomli.loads(text)["training"]["img_size"] == 256


def test_the_reference_is_current():
    sys.path.insert(0, str(REPO / "scripts"))
    try:
        import configuration_reference as reference
    finally:
        sys.path.pop(0)
    written = reference.PATH.read_text(encoding="utf-8")
    assert written == reference.text(), "run python scripts/configuration_reference.py"


def test_what_is_not_used_is_said_once(tmp_path, caplog):
    (tmp_path / "theirs.toml").write_text(
        "[validation]\ndenoising_steps = 4\nsave_img_count = 1\n"
        '[model]\nhf_assets_path = "x"\n[training]\nimg_size = 8\nseq_len = 2048\n'
    )
    argv = ["--job.config_file", str(tmp_path / "theirs.toml")]
    with caplog.at_level(logging.WARNING):
        load_config(argv)
    said = [record.getMessage() for record in caplog.records]
    assert (
        "validation.denoising_steps, validation.save_img_count: not used; [sampling] draws pictures"
        in said
    )
    assert sorted(line.split(":")[0] for line in said) == [
        "model.hf_assets_path",
        "validation.denoising_steps, validation.save_img_count",
    ], "seq_len stands at its default"


def test_drawing_asks_for_nothing_that_only_training_needs(arguments):
    """The data may be gone, the machine another one."""
    argv = [
        *arguments(""),
        *("--training.dataset", "folder", "--training.dataset_path", "/nowhere/pictures"),
        *("--training.enable_cpu_offload", "--checkpoint.async_mode", "async_with_pinned_mem"),
    ]
    load_config(argv, training=False)
    with pytest.raises(ConfigError) as error:
        load_config(argv)
    assert len(error.value.found) >= 3


def test_a_name_that_no_file_can_have_is_not_there():
    assert locate("a red fox " * 30) is None
    assert locate("/" + "a red fox " * 30) is None
    assert locate("~nobody-of-that-name/flux") is None


def test_a_configuration_for_another_machine_is_read_unchecked():
    """A comma of a sentence separates nothing, a home folder is one."""
    argv = ["--encoder.t5_encoder", "not/here/at_all", "--job.dump_folder", "~/runs/a"]
    config = read_config([*argv, "--sampling.prompts", "a red fox, digital art"])
    assert config.encoder.t5_encoder == "not/here/at_all"
    assert config.job.dump_folder == str(Path.home() / "runs/a")
    assert config.sampling.prompts == ["a red fox, digital art"]
    with pytest.raises(ConfigError):
        read_config(["--encoder.t6_encoder", "x"])
