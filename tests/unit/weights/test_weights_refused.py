"""Weights that are not what they claim: one message with names and remedy, nothing written."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
import torch.distributed.checkpoint as dcp
import weight_files as made
from safetensors.torch import load_file, save_file

from torchtitan_flux.tensor_files.safetensors_file import TensorsFile, UnreadableWeights
from torchtitan_flux.weights import convert_command
from torchtitan_flux.weights.convert import convert
from torchtitan_flux.weights.key_maps import to_layout

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SINGLE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    """One of each format; a test changes its own copy."""
    folder, states = tmp_path_factory.mktemp("good"), made.state_dict(made.GUIDED)
    return {
        name: made.make(folder / name, name, made.GUIDED, states)
        for name in ("dcp", "bfl", "comfyui", "diffusers", "sharded")
    }


def rewrite(path: Path, change: Callable[[dict], dict]) -> None:
    with_metadata = TensorsFile.open(path).metadata
    save_file(change(load_file(path)), path, metadata=with_metadata)


def reheader(path: Path, change: Callable[[dict], None], text: bytes | None = None) -> None:
    """Change the header of a file and leave its data as they are."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = text or json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def drop(name: str) -> Callable[[dict], dict]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def config(**change: object) -> Callable[[Path], None]:
    return lambda path: edit_json(path / "config.json", lambda content: content.update(change))


def shard(number: int) -> str:
    return f"diffusion_pytorch_model-0000{number}-of-00003.safetensors"


def overlap(header: dict) -> None:
    begin, end = header["img_in.weight"]["data_offsets"]
    header["img_in.weight"]["data_offsets"] = [begin - 4, end - 4]


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(bytes(content))


class Payload:
    def __reduce__(self):
        return (print, ("this must not run",))


def code_in_metadata(path: Path) -> None:
    (path / "manifest.json").unlink()
    (path / ".metadata").write_bytes(pickle.dumps(Payload()))


ARGUMENTS = {"torchtitan_flux.model_args": '{"hidden_size": "wide"}'}

# What `source` names, how a copy of it is spoilt (which may return another path), the message.
CASES: dict[str, tuple[str, Callable, str]] = {
    "unknown, comfyui": (
        "comfyui",
        lambda p: rewrite(p, lambda t: {**t, "hypernet.weight": torch.ones(2)}),
        r"1 unknown: hypernet\.weight; leave them out with .*_weights drop",
    ),
    "truncated": (
        "bfl",
        lambda p: os.truncate(p, p.stat().st_size - 100),
        r"was cut off or damaged \(.*not fully covered\); get it again",
    ),
    "overlap": ("bfl", lambda p: reheader(p, overlap), r"invalid offset for tensor"),
    "arguments": (
        "bfl",
        lambda p: reheader(p, lambda header: header["__metadata__"].update(ARGUMENTS)),
        r"no usable torchtitan_flux\.model_args",
    ),
    "pickle by name": (
        "bfl",
        lambda p: p.rename(p.with_suffix(".pt")),
        r"is a pickle.*give a safetensors file",
    ),
    "a shard alone": (
        "sharded",
        lambda p: p / shard(2),
        r"is only a part of a model; give its folder, .*sharded",
    ),
    "missing shard": (
        "sharded",
        lambda p: (p / shard(2)).unlink(),
        r"index\.json names .*00002-of-00003\.safetensors, which",
    ),
    "missing index and shard": (
        "sharded",
        lambda p: (p / shard(2)).unlink() or (p / INDEX).unlink(),
        r"has .*00001-of-00003.*, 2 of 3 files; get the others",
    ),
    "index outside": (
        "sharded",
        lambda p: edit_json(p / INDEX, lambda i: i["weight_map"].update({"proj_out.bias": "../x"})),
        r"weight_map is no table of file names",
    ),
    "no config": (
        "sharded",
        lambda p: (p / "config.json").unlink() or p / INDEX,
        r"does not say how its heads of 8 are divided .*--flavor",
    ),
    "config without depth": (
        "diffusers",
        lambda p: edit_json(p / "config.json", lambda content: content.pop("num_layers")),
        r"has no entry 'num_layers'",
    ),
    "deeper config": ("diffusers", config(num_layers=3), r"missing: transformer_blocks\.2\."),
    "patches": ("diffusers", config(patch_size=2), r"patch_size is 2"),
    "empty folder": (
        "bfl",
        lambda p: (p.parent / "empty").mkdir() or p.parent / "empty",
        r"holds no FLUX weights: expected is",
    ),
    "several files": (
        "bfl",
        lambda p: Path(shutil.copy(p, p.with_name("flux1-other.safetensors"))).parent,
        r"several models: flux1-other.safetensors, flux1-tiny",
    ),
    "damaged": ("dcp", flip_a_bit, r"is damaged: the checksum of __0_0\.distcp is wrong"),
    "no manifest": (
        "dcp",
        lambda p: (p / "manifest.json").unlink(),
        r"has no manifest\.json: it was not saved completely",
    ),
    "code": ("dcp", code_in_metadata, r"names builtins\.print, which no checkpoint of DCP needs"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_one_message_and_nothing_written(good, tmp_path, capsys, case):
    source, spoil, message = CASES[case]
    root = tmp_path / "copy" / source
    original = good[source]
    copied = root / original.name if original.is_file() or source == "dcp" else root
    copied.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copy if original.is_file() else shutil.copytree)(original, copied)
    path = spoil(copied) or copied
    target = tmp_path / "out" / "made"
    if source == "dcp":  # a checkpoint alone does not say how its heads are divided
        with pytest.raises((ValueError, OSError), match=message):
            convert(path, target, "dcp", args=made.GUIDED)
    else:
        with pytest.raises(SystemExit) as left:
            convert_command.main([str(path), str(target), "--to", "dcp"])
        assert left.value.code == 2
        stderr = capsys.readouterr().err
        assert stderr.startswith("Cannot convert: ")
        assert stderr.count("\n") == 1, "one message"
        assert re.search(message, stderr), stderr
    assert not target.parent.exists(), "nothing half-written"


def test_another_flavor_is_refused(good, capsys, tmp_path):
    for flavor, message in (
        ("flux-dev", "was made with axes_dim"),
        ("flux-tiny", "another flavor than named: hidden_size is 40, the flavor's 192"),
    ):
        with pytest.raises(SystemExit) as left:
            convert_command.main(
                [str(good["bfl"]), str(tmp_path / "x"), "--to", "dcp", "--flavor", flavor]
            )
        assert left.value.code == 2
        told = capsys.readouterr().err
        assert message in told
    named = ["--flavor", "flux-dev", "--guidance_weights", "drop"]
    with pytest.raises(SystemExit):
        convert_command.main([str(good["bfl"]), str(tmp_path / "x"), "--to", "dcp", *named])
    assert "contradicts --flavor flux-dev" in capsys.readouterr().err


def test_a_file_of_ours_without_its_metadata_needs_a_flavor(tmp_path):
    path = tmp_path / "flux1-x.safetensors"
    save_file(to_layout("bfl", made.state_dict(made.ARGS), made.ARGS), path)
    with pytest.raises(UnreadableWeights, match=r"rotary axes; name the flavor.*flux-tiny"):
        convert(path, tmp_path / "out", "dcp")
    convert(path, tmp_path / "out", "dcp", args=made.ARGS)


def test_a_foreign_checkpoint_of_another_model(tmp_path):
    dcp.save({"layers.0.weight": torch.ones(3)}, checkpoint_id=tmp_path / "step-1", no_dist=True)
    with pytest.raises(UnreadableWeights, match=r"layers\.0.*no FLUX"):
        convert(tmp_path / "step-1", tmp_path / "out", "dcp")
