"""Files that are no FLUX.1 transformer are called what they are, by every program that reads."""

import gzip
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import made_weights as made
import pytest
import torch

from torchtitan_flux.inference import open_run as session
from torchtitan_flux.model import FLAVORS
from torchtitan_flux.startup.load_config import ConfigError, load_config
from torchtitan_flux.tensor_files.safetensors_file import TensorsFile, UnreadableWeights
from torchtitan_flux.weights import convert_command
from torchtitan_flux.weights.key_maps import foreign_shapes, layout_entries
from torchtitan_flux.weights.open import open_weights

AE, T5 = "is an autoencoder", "is a T5 text encoder"
LORA, CONTROL, IP = "is a LoRA (adapter)", "is a ControlNet", "is an IP-Adapter"
BASE = ("img_in.weight", "double_blocks.0.img_mod.lin.weight")

NAMES: dict[str, tuple[tuple[str, ...], str]] = {
    "peft": (("transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight",), LORA),
    "peft, saved from a model": (
        ("base_model.model.transformer_blocks.0.attn.to_q.lora_B.default.weight",), LORA,
    ),
    "kohya": (
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
         "lora_unet_double_blocks_0_img_attn_proj.alpha", "lora_te1_text_model_encoder.alpha"),
        LORA,
    ),
    "XLabs": (("double_blocks.0.processor.proj_lora1.down.weight",), LORA),
    "diffusers before peft": (("transformer.transformer_blocks.0.attn.to_q.lora.up.weight",), LORA),
    "LoKr": (("lycoris_double_blocks_0_img_attn_proj.lokr_w1",), LORA),
    "LoHa": (("lycoris_single_blocks_0_linear1.hada_w1_a",), LORA),
    "DoRA": (("transformer.proj_out.lora_magnitude_vector.weight",), LORA),
    "full differences": (("diffusion_model.double_blocks.0.img_attn.proj.diff",), LORA),
    "BFL's LoRA of Canny": (
        ("img_in.lora_A.weight", "double_blocks.0.img_attn.norm.query_norm.scale"), LORA,
    ),
    "not merged": (
        ("base_model.model.x_embedder.weight",
         "base_model.model.transformer_blocks.0.attn.to_q.base_layer.weight"),
        "is a model with a LoRA (adapter) that is not merged",
    ),
    "ControlNet of XLabs": ((*BASE, "controlnet_blocks.0.weight"), CONTROL),
    "ControlNet of diffusers": (
        ("x_embedder.weight", "controlnet_x_embedder.weight", "transformer_blocks.0.ff.net.2.bias"),
        CONTROL,
    ),
    "IP-Adapter of XLabs": (
        ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",), IP,
    ),
    "IP-Adapter": (("image_proj.proj.weight", "ip_adapter.0.to_k_ip.weight"), IP),
    "Redux": (("redux_up.weight", "redux_down.weight"), "is FLUX.1 Redux"),
    "autoencoder": (("encoder.conv_in.weight", "decoder.up.0.block.0.conv1.weight"), AE),
    "autoencoder of a checkpoint": (("first_stage_model.decoder.conv_in.weight",), AE),
    "autoencoder of diffusers": (
        ("encoder.down_blocks.0.resnets.0.conv1.bias", "encoder.mid_block.resnets.0.conv1.bias"),
        AE,
    ),
    "SD 1.5, whole": (
        ("model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.text_model.x.weight",
         "first_stage_model.encoder.conv_in.weight"),
        "is a U-Net, as of Stable",
    ),
    "decoder alone": (("decoder.layers.3.weight",), AE),
    "T5": (("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"), T5),
    "T5 of llama.cpp": (("enc.blk.0.attn_q.weight",), T5),
    "CLIP": (("text_model.encoder.layers.0.mlp.fc1.weight",), "is a CLIP encoder"),
    "SDXL": (("model.diffusion_model.input_blocks.0.0.weight",), "is a U-Net, as of Stable"),
    "U-Net of diffusers": (("down_blocks.0.resnets.0.conv1.weight",), "is a U-Net"),
    "SD3": (("model.diffusion_model.joint_blocks.0.x.bias",), "Stable Diffusion 3"),
    "Chroma": ((*BASE, "distilled_guidance_layer.in_proj.weight"), "is Chroma, another model"),
    "FLUX.2": ((*BASE, "double_stream_modulation_img.lin.weight"), "is FLUX.2, another model"),
    "Qwen-Image": (("img_in.weight", "transformer_blocks.0.img_mod.1.weight"), "is Qwen-Image"),
    "optimizer": (("double_blocks.0.img_mod.lin.weight.exp_avg",), "is the state of an optimizer"),
    "nothing": ((), "holds no FLUX transformer, nor any tensor"),
    "anything else": (("a.weight", "b.weight"), "its 2 tensors are named a.weight"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_weights_are_called_what_they_are(tmp_path, kind):
    names, said = NAMES[kind]
    path = made.sparse(tmp_path / "some.safetensors", {name: (2, 3) for name in names})
    for args in (None, made.ARGS):
        with pytest.raises(UnreadableWeights) as error:
            open_weights(path, args)
        assert str(error.value).startswith(str(path))
        assert said in str(error.value)
        assert "\n" not in str(error.value)


def zipped(name: str) -> bytes:
    with zipfile.ZipFile("some.zip", "w") as archive:
        archive.writestr(name, b"x" * 100)
    return Path("some.zip").read_bytes()


PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>" + b" " * 4000
CONTENTS = {
    "web page": (lambda: PAGE, "is a web page or XML, not weights; .*with a token"),
    "page after spaces": (lambda: b"\n\n  <html lang='de'>\xc3\xa4", "is a web page"),
    "XML": (lambda: b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page or XML"),
    "JSON": (lambda: b'{"error": "Repository is gated"}', r"is a JSON text.*Repository is gated"),
    "text": (lambda: b"Invalid username or password.", "is a text, .*Invalid username.*token"),
    "short text": (lambda: b"denied", "is a text, .*denied"),
    "pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
    "GGUF": (lambda: b"GGUF\x03\x00\x00\x00" + bytes(90), "is a GGUF file"),
    "pickle": (lambda: pickle.dumps(list(range(99))), "is a pickle by its contents"),
    "torch": (lambda: zipped("archive/data.pkl"), "is a pickle by its contents"),
    "zip": (lambda: zipped("flux1-dev.safetensors"), "is compressed by zip; unpack it"),
    "cut zip": (lambda: zipped("archive/data.pkl")[:60], "that was cut off; get it again"),
    "gzip": (lambda: gzip.compress(bytes(90)), "is compressed by gzip; unpack it"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(90), "is an HDF5 file"),
    "picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(90), "is a PNG picture, not weights"),
    "noise": (lambda: bytes(range(200, 256)), "is no safetensors file, or was cut off"),
    "nothing": (lambda: b"", r"damaged \(header too small\)"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_files_are_called_what_they_are(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    content, said = CONTENTS[kind]
    for name in ("flux1-dev.safetensors", "ae.sft"):
        Path(name).write_bytes(content())
        with pytest.raises(UnreadableWeights, match=rf"^{name} {said}|^{name} .*{said}"):
            open_weights(name)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "flux1-dev.safetensors")
    with pytest.raises(UnreadableWeights, match="is no file"):
        TensorsFile.open(tmp_path / "flux1-dev.safetensors")
    with pytest.raises(UnreadableWeights, match="is no file"):
        open_weights(tmp_path / "flux1-dev.safetensors")


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"_class_name": "FluxControlNetModel"}, "'FluxControlNetModel', a ControlNet, needed is"),
        ({"_class_name": "AutoencoderKL"}, "an autoencoder"),
        ({"architectures": ["T5EncoderModel"]}, "'T5EncoderModel', a T5 text encoder"),
        ({"_class_name": "Flux2Transformer2DModel"}, "FLUX.2"),
    ],
)
def test_folders_are_called_what_they_are(tmp_path, described, said):
    (tmp_path / "config.json").write_text(json.dumps(described))
    made.sparse(tmp_path / "diffusion_pytorch_model.safetensors", {"x": (1,)})
    with pytest.raises(UnreadableWeights, match=said):
        open_weights(tmp_path)


def test_a_folder_tells_what_it_holds_instead(tmp_path):
    for name, said in (
        ("flux1-dev-Q8_0.gguf", "is a GGUF file"),
        ("flux1-dev.pt", "is a pickle by its name"),
        ("__0_0.distcp", r"has no \.metadata: a DCP checkpoint that was not saved"),
        ("optimizer.bin", "holds no FLUX weights: expected is"),
        ("zero_to_fp32.py", "is a checkpoint of DeepSpeed: run its zero_to_fp32.py"),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(90))
        with pytest.raises(UnreadableWeights, match=said):
            open_weights(folder)
    (tmp_path / "run" / "checkpoint" / "step-90").mkdir(parents=True)
    with pytest.raises(UnreadableWeights, match=r"of a run; give one, as .*checkpoint/step-90"):
        open_weights(tmp_path / "run")
    (tmp_path / "trained" / "checkpoint-500").mkdir(parents=True)
    (tmp_path / "trained" / "checkpoint-1000").mkdir()
    with pytest.raises(UnreadableWeights, match=r"of a run; give one, as .*checkpoint-1000"):
        open_weights(tmp_path / "trained")


def test_every_program_says_the_same(tmp_path, capsys):
    """The check of a run, drawing, and converting."""
    path = made.sparse(tmp_path / "lora.safetensors", {"img_in.lora_A.weight": (2, 3)})
    said = f"{path} is a LoRA (adapter), not whole weights; there is no LoRA here: merge it"
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
    with pytest.raises(ConfigError, match="is a LoRA"):
        load_config(run)
    made.save_checkpoint(
        tmp_path / "run" / "checkpoint" / "step-7", made.ARGS, {"x": torch.ones(2)}
    )
    assert load_config(run).checkpoint.enable
