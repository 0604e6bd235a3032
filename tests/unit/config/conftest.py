"""A scratch folder with a file `run.toml`, and things that are not what they claim to be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from unit.config.refusals import BASE, Refusal

from torchtitan_flux.parallel.card import Card
from torchtitan_flux.startup import checks

TINY = Path(__file__).resolve().parents[3] / "assets" / "tiny"


_WI = "encoder.block.0.layer.1.DenseReluDense.wi_0"
CHANGED = {
    "stray": ("t5", lambda t: {**t, "encoder.block.0.bias": torch.ones(3)}),
    "headless": ("clip", lambda t: {n: x for n, x in t.items() if "final_layer_norm" not in n}),
    "int8": ("t5", lambda t: {**t, f"{_WI}.SCB": torch.ones(64)}),
    "unscaled": (
        "t5",
        lambda t: {
            **t,
            f"{_WI}.weight": t[f"{_WI}.weight"].to(torch.float8_e4m3fn),
            "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn),
        },
    ),
}
"""Text encoders with other weights than their config.json asks for."""


def put_stand_in(name: str, folder: Path) -> None:
    """A thing of `Refusal.needs`."""
    path = folder / name
    if name == "folder":
        path.mkdir()
    elif name == "picture.toml":
        path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff" * 9)
    elif name == "pointer.safetensors":
        path.write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 335304388\n"
        )
    elif name == "page.safetensors":
        path.write_text("<!DOCTYPE html><html><title>Sign in</title></html>")
    elif name == "link.safetensors":
        path.symlink_to("/mnt/gone/flux1-dev.safetensors")
    elif name == "lora.safetensors":
        header = b'{"x.lora_A.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    elif name == "cut.safetensors":
        path.write_bytes((TINY / "ae.safetensors").read_bytes()[:600_000])
    elif name == "shards":
        shutil.copytree(TINY / "t5", path)
        (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
        shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    elif name == "pickled":
        shutil.copytree(TINY / "clip", path)
        (path / "model.safetensors").rename(path / "pytorch_model.bin")
    elif name in CHANGED:
        part, change = CHANGED[name]
        shutil.copytree(TINY / part, path)
        weights = path / "model.safetensors"
        save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    elif name == "quantised":
        shutil.copytree(TINY / "t5", path)
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (path / "config.json").write_text(json.dumps(config))
    else:
        raise ValueError(name)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Refusal -> the command line that it is refused by, in a folder of its own."""

    def prepare(case: Refusal) -> list[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("WORLD_SIZE", str(case.ranks))
        for name in case.needs:
            if name == "card 7.5":
                monkeypatch.setattr(checks, "card", lambda: Card("Tesla T4", (7, 5)))
            elif name == "no wandb":
                monkeypatch.setattr(
                    checks, "find_spec", lambda name: None if name == "wandb" else 1
                )
            else:
                put_stand_in(name, tmp_path)
        given = {text.split(" = ")[0] for text in case.toml.splitlines()}
        sections = {key.split(".")[0] for key in given if "." not in key}
        base = [
            f"{key} = {value}"
            for key, value in BASE.items()
            if key not in given and key.split(".")[0] not in sections
        ]
        (tmp_path / "run.toml").write_text("\n".join([*case.toml.splitlines(), *base]) + "\n")
        named = any(argument == "--job.config_file" for argument in case.argv)
        return [*([] if named else ["--job.config_file", "run.toml"]), *case.argv]

    return prepare
