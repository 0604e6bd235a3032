"""Weights that are not what they claim: one message with names and remedy, nothing written."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import made_weights as made
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from torchtitan_flux.tensor_files.safetensors_file import TensorsFile, UnreadableWeights
from torchtitan_flux.weights import convert_command
from torchtitan_flux.weights.convert import convert
from torchtitan_flux.weights.key_maps import to_bfl

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


# Each takes a copy of what `source` names, spoils it, and may return another path to convert.


def missing_key(path):
    rewrite(path, lambda t: {n: v for n, v in t.items() if n != "txt_in.bias"})


def extra_key(path):
    rewrite(path, lambda t: {**t, "lora_A.weight": torch.ones(2)})


def mis_shaped_key(path):
    rewrite(path, lambda t: {**t, "double_blocks.1.img_mlp.0.bias": torch.ones(7)})


def missing_in_diffusers(path):
    rewrite(path / SINGLE, lambda t: {n: v for n, v in t.items() if "1.attn.to_k.bias" not in n})


def extra_in_diffusers(path):
    rewrite(path / SINGLE, lambda t: {**t, "controlnet.weight": torch.ones(2)})


def no_transformer(path):
    rewrite(path, lambda t: {"model.layers.0.weight": torch.ones(2)})


def unknown_part(path):
    rewrite(path, lambda t: {**t, "hypernet.weight": torch.ones(2)})


def truncated(path):
    os.truncate(path, path.stat().st_size - 100)


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:46\nsize 2380\n")


def too_short(path):
    path.write_bytes(b"\x01\x02")


def long_header(path):
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")


def no_json(path):
    reheader(path, lambda _: None, b"{broken")


def overlapping(path):
    def change(header):
        begin, end = header["img_in.weight"]["data_offsets"]
        header["img_in.weight"]["data_offsets"] = [begin - 4, end - 4]

    reheader(path, change)


def hole(path):
    reheader(path, lambda header: header.pop("img_in.weight"))


def unknown_type(path):
    reheader(path, lambda header: header["img_in.bias"].update(dtype="F6_X"))


def wrong_length(path):
    reheader(path, lambda header: header["img_in.bias"].update(shape=[41]))


def negative_size(path):
    reheader(path, lambda header: header["img_in.bias"].update(shape=[-40]))


def bad_arguments(path):
    change = {"torchtitan_flux.model_args": '{"hidden_size": "wide"}'}
    reheader(path, lambda header: header["__metadata__"].update(change))


def quantised(path):
    rewrite(path, lambda t: {**t, "img_in.weight": t["img_in.weight"].to(torch.int8)})


def pickle_by_name(path):
    torch.save({"img_in.weight": torch.ones(2)}, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def pickle_by_contents(path):
    torch.save({"img_in.weight": torch.ones(2)}, path)


def old_pickle_by_contents(path):
    path.write_bytes(pickle.dumps({"weights": list(range(1000))}))


def pickle_in_a_folder(path):
    (path / SINGLE).rename(path / "diffusion_pytorch_model.bin")


def gguf(path):
    path.write_bytes(b"GGUF" + bytes(range(1, 60)))


def a_shard_alone(path):
    return path / "diffusion_pytorch_model-00002-of-00003.safetensors"


def missing_shard(path):
    (path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()


def missing_index_and_shard(path):
    (path / INDEX).unlink()
    missing_shard(path)


def index_outside(path):
    edit_json(path / INDEX, lambda i: i["weight_map"].update({"proj_out.bias": "../x"}))


def index_of_another(path):
    first = "diffusion_pytorch_model-00001-of-00003.safetensors"
    edit_json(path / INDEX, lambda i: i["weight_map"].update(dict.fromkeys(i["weight_map"], first)))


def index_no_json(path):
    (path / INDEX).write_text("[")


def no_config(path):
    (path / "config.json").unlink()
    return path / INDEX


def other_class(path):
    edit_json(path / "config.json", lambda c: c.update(_class_name="SD3Transformer2DModel"))


def config_without_depth(path):
    edit_json(path / "config.json", lambda c: c.pop("num_layers"))


def deeper_config(path):
    edit_json(path / "config.json", lambda c: c.update(num_layers=3))


def wrong_folder(path):
    (path.parent / "empty").mkdir()
    return path.parent / "empty"


def run_folder(path):
    return path.parent


def several_files(path):
    shutil.copy(path, path.with_name("flux1-other.safetensors"))
    return path.parent


def nothing_there(path):
    return path.with_name("absent")


def damaged_checkpoint(path):
    data = path / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))


def no_manifest(path):
    (path / "manifest.json").unlink()


class Payload:
    def __reduce__(self):
        return (print, ("this must not run",))


def metadata_with_code(path):
    (path / "manifest.json").unlink()
    (path / ".metadata").write_bytes(pickle.dumps(Payload()))


CASES: list[tuple[str, Callable, str]] = [
    ("bfl", missing_key, r"1 missing: txt_in\.bias"),
    ("bfl", pointer, r"is a Git LFS pointer, not the weights: run `git lfs pull` there"),
    ("bfl", extra_key, r"1 unknown: lora_A\.weight"),
    ("bfl", mis_shaped_key, r"1 mis-shaped: double_blocks\.1\.img_mlp\.0\.bias: \(7,\), expected"),
    ("diffusers", missing_in_diffusers, r"missing: .*transformer_blocks\.1\.attn\.to_k\.bias"),
    ("diffusers", extra_in_diffusers, r"1 unknown: controlnet\.weight"),
    ("comfyui", unknown_part, r"1 unknown: hypernet\.weight; leave them out with .*_weights drop"),
    ("bfl", no_transformer, r"no FLUX transformer: its 1 tensors are named model\.layers\.0"),
    ("bfl", truncated, r"was cut off or damaged \(.*not fully covered\); get it again"),
    ("bfl", too_short, r"damaged \(header too small\)"),
    ("bfl", long_header, r"damaged \(header too large\)"),
    ("bfl", no_json, r"invalid JSON in header"),
    ("bfl", overlapping, r"invalid offset for tensor"),
    ("bfl", hole, r"invalid offset for tensor"),
    ("bfl", unknown_type, r"unknown variant `F6_X`"),
    ("bfl", wrong_length, r"invalid shape, data type, or offset"),
    ("bfl", negative_size, r"invalid value: integer `-40`"),
    ("bfl", bad_arguments, r"torchtitan_flux\.model_args is not usable"),
    ("bfl", quantised, r"quantised or integer weights.*img_in\.weight \(torch\.int8\)"),
    ("bfl", pickle_by_name, r"is a pickle by its name.*give a safetensors file"),
    ("bfl", pickle_by_contents, r"is a pickle by its contents.*give a safetensors file"),
    ("bfl", old_pickle_by_contents, r"is a pickle by its contents"),
    ("diffusers", pickle_in_a_folder, r"diffusion_pytorch_model\.bin is a pickle"),
    ("bfl", gguf, r"GGUF.*quantised.*give the safetensors file"),
    ("sharded", a_shard_alone, r"is one of 3 files of a model; give their folder, .*sharded"),
    ("sharded", missing_shard, r"index\.json names .*00002-of-00003\.safetensors, which"),
    ("sharded", missing_index_and_shard, r"has .*00001-of-00003.*, 2 of 3 files; get the others"),
    ("sharded", index_outside, r"weight_map is no table of file names"),
    ("sharded", index_of_another, r"missing: x_embedder"),
    ("sharded", index_no_json, r"index\.json is not JSON"),
    ("sharded", no_config, r"does not say how its heads of 8 are divided .*--flavor"),
    ("diffusers", other_class, r"'SD3Transformer2DModel', needed is a FluxTransformer2DModel"),
    ("diffusers", config_without_depth, r"has no entry 'num_layers'"),
    ("diffusers", deeper_config, r"missing: transformer_blocks\.2\."),
    ("bfl", wrong_folder, r"holds no FLUX weights: expected is"),
    ("dcp", run_folder, r"holds checkpoints of a run; give one, as .*step-7"),
    ("bfl", several_files, r"several models: flux1-other.safetensors, flux1-tiny"),
    ("bfl", nothing_there, r"absent does not exist"),
    ("dcp", damaged_checkpoint, r"is damaged: the checksum of __0_0\.distcp is wrong"),
    ("dcp", no_manifest, r"has no manifest\.json: it was not saved completely"),
    ("dcp", metadata_with_code, r"names builtins\.print, which no checkpoint of DCP needs"),
]


@pytest.mark.parametrize(
    ("source", "spoil", "message"), CASES, ids=[case[1].__name__ for case in CASES]
)
def test_refused_with_one_message_and_nothing_written(
    good, tmp_path, capsys, source, spoil, message
):
    root = tmp_path / "copy" / source
    original = good[source]
    copied = root / original.name if original.is_file() or source == "dcp" else root
    copied.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copy if original.is_file() else shutil.copytree)(original, copied)
    path = spoil(copied) or copied
    target = tmp_path / "out" / "made"
    arguments = [str(path), str(target), "--to", "dcp"]
    if source == "dcp":  # a checkpoint alone does not say how its heads are divided
        with pytest.raises((ValueError, OSError), match=message):
            convert(path, target, "dcp", args=made.GUIDED)
    else:
        with pytest.raises(SystemExit) as left:
            convert_command.main(arguments)
        assert left.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith("Cannot convert: ")
        assert told.count("\n") == 1, "one message"
        assert re.search(message, told), told
    assert not target.parent.exists(), "nothing half-written"


def test_no_memory_is_taken_on_the_word_of_a_header(tmp_path):
    """A header may claim anything; only the file's own length counts."""
    entry = {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}
    text = json.dumps({"img_in.weight": entry}).encode()
    path = tmp_path / "flux1-huge.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(UnreadableWeights, match=r"was cut off or damaged \(overflow"):
        TensorsFile.open(path)


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
    save_file(to_bfl(made.state_dict(made.ARGS), made.ARGS), path)
    with pytest.raises(UnreadableWeights, match=r"rotary axes; name the flavor.*flux-tiny"):
        convert(path, tmp_path / "out", "dcp")
    convert(path, tmp_path / "out", "dcp", args=made.ARGS)


def test_a_foreign_checkpoint_of_another_model(tmp_path):
    dcp.save({"layers.0.weight": torch.ones(3)}, checkpoint_id=tmp_path / "step-1", no_dist=True)
    with pytest.raises(UnreadableWeights, match=r"no FLUX .*layers\.0"):
        convert(tmp_path / "step-1", tmp_path / "out", "dcp")
