"""Files that are no FLUX.1 transformer are called what they are, by every program that reads."""

import json
import os
import pickle
import re
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
import weight_files as made

from torchtitan_flux.inference import open_run as session
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.startup.load_config import ConfigError, load_config
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.weights import convert_command
from torchtitan_flux.weights.key_maps import foreign_shapes, layout_entries
from torchtitan_flux.weights.open import open_weights

LORA = "a LoRA (adapter)"
NAMES: dict[str, tuple[tuple[str, ...], str]] = {
    "peft": (("transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight",), LORA),
    "kohya": (("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",), LORA),
    "XLabs": (("double_blocks.0.processor.proj_lora1.down.weight",), LORA),
    "LoKr": (("lycoris_double_blocks_0_img_attn_proj.lokr_w1",), LORA),
    "full differences": (("diffusion_model.double_blocks.0.img_attn.proj.diff",), LORA),
    "BFL's LoRA of Canny": (
        ("img_in.lora_A.weight", "double_blocks.0.img_attn.norm.query_norm.scale"), LORA,
    ),
    "autoencoder": (("encoder.conv_in.weight", "decoder.conv_in.weight"), "an autoencoder"),
    "T5": (("encoder.block.0.layer.0.SelfAttention.q.weight",), "a T5 text encoder"),
    "CLIP": (("text_model.encoder.layers.0.mlp.fc1.weight",), "a CLIP encoder"),
    "nothing": ((), "0 tensors ()"),
    "anything else": (("a.weight", "b.weight"), "2 tensors (a.weight, b.weight)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_weights_are_called_what_they_are(tmp_path, kind):
    names, said = NAMES[kind]
    path = made.sparse(tmp_path / "some.safetensors", {name: (2, 3) for name in names})
    for args in (None, made.ARGS):
        with pytest.raises(UnreadableWeights) as error:
            open_weights(path, args)
        assert str(error.value).startswith(str(path))
        assert f"holds {said} and no FLUX transformer" in str(error.value)
        assert "\n" not in str(error.value)


CONTENTS = {
    "web page": (b"<!DOCTYPE html>\n<html>" + b" " * 4000, "is a web page, not .*with a token"),
    "XML": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page"),
    "JSON": (b'{"error": "Repository is gated"}', "is a web page"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid",
        "LFS pointer.*git lfs pull",
    ),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(90), "is a GGUF file"),
    "pickle": (pickle.dumps(list(range(99))), "is a pickle"),
    "torch": (b"PK\x03\x04" + bytes(90), "is a pickle"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(90), "is a PNG picture, not weights"),
    "noise": (bytes(range(200, 256)), "is no safetensors file, or was cut off"),
    "nothing": (b"", r"damaged \(header too small\)"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_files_are_called_what_they_are(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    content, said = CONTENTS[kind]
    for name in ("flux1-dev.safetensors", "ae.sft"):
        Path(name).write_bytes(content)
        with pytest.raises(UnreadableWeights, match=rf"^{name} .*{said}"):
            open_weights(name)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "flux1-dev.safetensors")
    with pytest.raises(UnreadableWeights, match="is no file"):
        open_weights(tmp_path / "flux1-dev.safetensors")


@pytest.mark.parametrize("key", ["_class_name", "architectures"])
def test_folders_are_called_what_they_are(tmp_path, key):
    (tmp_path / "config.json").write_text(json.dumps({key: "AutoencoderKL"}))
    made.sparse(tmp_path / "diffusion_pytorch_model.safetensors", {"x": (1,)})
    with pytest.raises(UnreadableWeights, match="describes a 'AutoencoderKL', needed is a Flux"):
        open_weights(tmp_path)


def test_folders_without_weights(tmp_path):
    for name in ("flux1-dev-Q8_0.gguf", "flux1-dev.pt", "__0_0.distcp"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(90))
        with pytest.raises(UnreadableWeights, match="holds no FLUX weights: expected is"):
            open_weights(folder)


def test_every_program_says_the_same(tmp_path, capsys):
    """The check of a run, drawing, and converting."""
    path = made.sparse(tmp_path / "lora.safetensors", {"img_in.lora_A.weight": (2, 3)})
    said = f"{path} holds a LoRA (adapter) and no FLUX transformer"
    run = ["--job.dump_folder", str(tmp_path / "run"), "--checkpoint.enable"]
    begin = ["--checkpoint.initial_load_path", str(path)]
    with pytest.raises(ConfigError) as error:
        load_config([*run, *begin, "--training.steps", "0"])
    assert len(error.value.found) == 2, "with everything else that is wrong"
    line = f'checkpoint.initial_load_path = "{path}": {said}'
    assert any(one.startswith(line) for one in error.value.found)
    config = load_config([*run, "--model.flavor", "flux-tiny", "--training.img_size", "64"])
    with pytest.raises(ValueError, match=re.escape(f"--weights {path}: {said}")):
        session._open(str(path), made.ARGS, config)
    with pytest.raises(SystemExit) as left:
        convert_command.main([str(path), str(tmp_path / "out"), "--to", "dcp"])
    assert left.value.code == 2
    assert f"Cannot convert: {said}" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["lora.safetensors"]


def test_a_run_leaves_unknown_tensors_out_when_told_to(tmp_path):
    tiny = FLAVORS["flux-tiny"]
    shapes = foreign_shapes(tiny, layout_entries("bfl", tiny))
    path = made.sparse(tmp_path / "more.safetensors", {**shapes, "hypernet.weight": (2,)})
    run = ["--model.flavor", "flux-tiny", "--training.img_size", "64", "--job.dump_folder",
           str(tmp_path / "run"), "--checkpoint.enable",
           "--checkpoint.initial_load_path", str(path)]  # fmt: skip
    with pytest.raises(ConfigError, match=r"1 unknown: hypernet\.weight.*unknown_weights = .drop"):
        load_config(run)
    config = load_config([*run, "--checkpoint.unknown_weights", "drop"])
    opened = session._open(str(path), tiny, config)
    assert opened.left_out == ["hypernet.weight"]


def test_a_run_that_has_its_own_weights_does_not_look_at_others(tmp_path):
    """The file that a run began with may be gone bad; what it goes on from is its own."""
    path = made.sparse(tmp_path / "lora.safetensors", {"img_in.lora_A.weight": (2, 3)})
    run = ["--job.dump_folder", str(tmp_path / "run"), "--checkpoint.enable",
           "--checkpoint.initial_load_path", str(path)]  # fmt: skip
    with pytest.raises(ConfigError, match="holds a LoRA"):
        load_config(run)
    made.save_checkpoint(
        tmp_path / "run" / "checkpoint" / "step-7", made.ARGS, {"x": torch.ones(2)}
    )
    assert load_config(run).checkpoint.enable
