"""The same weights as people have them: behind prefixes, in variants, folders of other programs."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import made_weights as made
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from torchtitan_flux.model import FLAVORS
from torchtitan_flux.tensor_files import hub_cache
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.tensor_files.state_dict_keys import KeyMismatch
from torchtitan_flux.weights import architecture, convert_command
from torchtitan_flux.weights.key_maps import (
    Layout,
    foreign_shapes,
    layout_entries,
    to_bfl,
    to_diffusers,
)
from torchtitan_flux.weights.open import open_weights
from torchtitan_flux.weights.pipeline_folder import pipeline_plan

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"
STATES = made.state_dict(made.ARGS)
BFL, DIFFUSERS = to_bfl(STATES, made.ARGS), to_diffusers(STATES, made.ARGS)
NAME = "single_blocks.1.linear1_by_head.weight"


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def config(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = architecture.to_diffusers_config(made.ARGS)
    (folder / "config.json").write_text(json.dumps(content))


def shards(folder: Path, pattern: str, index: str = "") -> None:
    """Two files, and what says what is in them where `index` names it."""
    names, table = list(DIFFUSERS), {}
    for i in (0, 1):
        file = pattern.format(i + 1)
        save(folder / file, {name: DIFFUSERS[name] for name in names[i::2]})
        table |= dict.fromkeys(names[i::2], file)
    if index:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": table}))


def is_whole(path: Path, format: str) -> None:
    """All of it can be read, and a fused parameter has its values."""
    weights = open_weights(path, made.ARGS)
    assert weights.format == format
    assert weights.shapes == {name: tuple(t.shape) for name, t in STATES.items()}
    assert torch.equal(weights.read(NAME), STATES[NAME])


# ---- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    ["transformer.", "model.", "module.", "_orig_mod.", "diffusion_model.", "state_dict.module.",
     "model.diffusion_model.", "module._orig_mod."],
)  # fmt: skip
@pytest.mark.parametrize("tensors", [BFL, DIFFUSERS], ids=["bfl", "diffusers"])
def test_any_prefix_is_read(tmp_path, prefix, tensors):
    path = save(tmp_path / "some.safetensors", {prefix + n: t for n, t in tensors.items()})
    format = "bfl" if tensors is BFL else "diffusers"
    is_whole(path, "comfyui" if (format, prefix) == ("bfl", "model.diffusion_model.") else format)


def test_wrappers_within_a_name_are_taken_out(tmp_path):
    named = {n.replace("blocks.1.", "blocks.1._orig_mod."): t for n, t in BFL.items()}
    assert named.keys() != BFL.keys()
    is_whole(save(tmp_path / "compiled.safetensors", named), "bfl")


def test_a_whole_checkpoint_gives_its_transformer(tmp_path, caplog):
    others = ("vae.decoder.conv_in.bias", "text_encoders.t5xxl.shared.weight",
              "text_encoders.clip_l.text_model.embeddings.position_ids",
              "first_stage_model.encoder.conv_in.weight")  # fmt: skip
    for prefix in ("model.diffusion_model.", "transformer.", ""):
        named = {prefix + n: t for n, t in BFL.items()} | {n: torch.ones(3) for n in others}
        path = save(tmp_path / f"all{len(prefix)}.safetensors", named)
        caplog.clear()
        caplog.set_level(logging.INFO)
        is_whole(path, "comfyui" if "diffusion" in prefix else "bfl")
        assert "first_stage_model., text_encoders., vae. are not read" in caplog.text


def test_two_transformers_in_one_file_are_not_guessed_between(tmp_path):
    both = {f"{prefix}.{n}": t.clone() for prefix in ("ema", "model") for n, t in BFL.items()}
    path = save(tmp_path / "two.safetensors", both)
    with pytest.raises(UnreadableWeights, match=r"several transformers, .*'ema' and 'model'"):
        open_weights(path, made.ARGS)


def test_unknown_tensors_are_named_and_left_out_on_purpose(tmp_path, caplog, capsys):
    stray = {"img_in.lora_A.weight": torch.ones(2), "hypernet.weight": torch.ones(2)}
    path = save(tmp_path / "flux1-x.safetensors", {**BFL, **stray})
    with pytest.raises(KeyMismatch, match=r"2 unknown: .*unknown_weights = \"drop\"") as error:
        open_weights(path, made.ARGS)
    assert sorted(error.value.unknown) == sorted(stray)
    weights = open_weights(path, made.ARGS, unknown="drop")
    assert weights.shapes.keys() == STATES.keys()
    assert all(name in caplog.text for name in stray)
    save(path, {n: t for n, t in {**BFL, **stray}.items() if n != "txt_in.bias"})
    for unknown in ("refuse", "drop"):  # what is missing is refused either way
        with pytest.raises(KeyMismatch, match=r"1 missing: txt_in\.bias"):
            open_weights(path, made.ARGS, unknown=unknown)

    save_file({**BFL, **stray}, path, metadata=architecture.to_metadata(made.ARGS))
    made_of = tmp_path / "made.safetensors"
    command = [str(path), str(made_of), "--to", "bfl", "--unknown_weights"]
    with pytest.raises(SystemExit):
        convert_command.main([*command, "refuse"])
    assert "when converting: --unknown_weights drop" in capsys.readouterr().err
    convert_command.main([*command, "drop"])
    assert torch.equal(open_weights(made_of).read(NAME), STATES[NAME])


# ---- files and folders -----------------------------------------------------------------------


def variant(*files: str, index: str = "", with_config: bool = True) -> Callable[[Path], Path]:
    """A diffusers folder of one file, or two shards; beside it are others without weights."""

    def build(path: Path) -> Path:
        if with_config:
            config(path)
        if "{}" in files[0]:
            shards(path, files[0], index)
        else:
            save(path / files[0], DIFFUSERS)
        for name in files[1:]:
            save(path / name, {"x": torch.ones(1)})
        return path

    return build


BF16 = ("diffusion_pytorch_model.bf16-0000{}-of-00002.safetensors", SINGLE)
BF16_INDEX = "diffusion_pytorch_model.safetensors.index.bf16.json"
FP16 = "diffusion_pytorch_model.fp16.safetensors"


def cache_of_the_hub(path: Path) -> Path:
    root = path / "models--black-forest-labs--FLUX.1-dev"
    for commit in ("abc", "old"):
        config(root / "snapshots" / commit / "transformer")
        (root / "snapshots" / commit / "model_index.json").write_text("{}")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    blob = save(root / "blobs" / "123", DIFFUSERS)
    (root / "snapshots" / "abc" / "transformer" / SINGLE).symlink_to(blob)
    return root


def trainers_checkpoint(path: Path) -> Path:
    variant(SINGLE)(path / "transformer")
    (path / "optimizer.bin").write_bytes(b"\x80\x02")
    return path


def accelerates_checkpoint(path: Path) -> Path:
    save(path / "model.safetensors", {f"module.{n}": t for n, t in BFL.items()})
    (path / "random_states_0.pkl").write_bytes(b"\x80\x02")
    return path


def dcp_of(path: Path, tensors: dict[str, Tensor]) -> Path:
    dcp.save({"model": tensors, "optim": {"state": {"img_in.weight": {"exp_avg": torch.ones(1)}}},
              "epoch": 3}, checkpoint_id=path, no_dist=True)  # fmt: skip
    return path


def pipeline(path: Path) -> Path:
    variant("diffusion_pytorch_model-0000{}-of-00002.safetensors", index=INDEX)(
        path / "transformer"
    )
    (path / "model_index.json").write_text("{}")
    return path


FOUND: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pipeline": (pipeline, "diffusers"),
    "index by name": (lambda path: pipeline(path) / "transformer" / INDEX, "diffusers"),
    "folder with one file": (
        lambda path: save(path / "flux1-x.safetensors", BFL).parent, "bfl",
    ),
    "fp16 alone": (variant(FP16), "diffusers"),
    "plain beside a variant": (variant(SINGLE, FP16), "diffusers"),
    "bf16 in shards": (variant(BF16[0], index=BF16_INDEX), "diffusers"),
    "older name of a variant": (
        variant("diffusion_pytorch_model-0000{}-of-00002.fp16.safetensors"), "diffusers",
    ),
    "index of a variant by name": (
        lambda path: variant(*BF16, index=BF16_INDEX)(path) / BF16_INDEX, "diffusers",
    ),
    "shards without index": (
        variant("diffusion_pytorch_model-0000{}-of-00002.safetensors"), "diffusers",
    ),
    "shards without config": (
        variant("model-0000{}-of-00002.safetensors", index="model.safetensors.index.json",
                with_config=False), "diffusers",
    ),
    "one file in diffusers' names": (
        lambda path: save(path / "flux.safetensors", DIFFUSERS), "diffusers",
    ),
    "sft": (lambda path: save(path / "flux1-dev.sft", BFL), "bfl"),
    "folder with sft": (
        lambda path: save(save(path / "flux1-dev.sft", BFL).with_name("ae.sft"),
                          {"decoder.conv_in.weight": torch.ones(1)}).parent, "bfl",
    ),
    "cache of the hub": (cache_of_the_hub, "diffusers"),
    "snapshots of the hub": (lambda path: cache_of_the_hub(path) / "snapshots", "diffusers"),
    "a trainer's checkpoint": (trainers_checkpoint, "diffusers"),
    "accelerate's checkpoint": (accelerates_checkpoint, "bfl"),
    "DCP in BFL's names": (lambda path: dcp_of(path, BFL), "bfl"),
    "DCP of accelerate": (
        lambda path: dcp_of(path / "pytorch_model_fsdp_0", DIFFUSERS).parent, "diffusers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_what_lies_there_is_found(tmp_path, case):
    build, format = FOUND[case]
    is_whole(build(tmp_path / "given"), format)


def test_the_command_converts_what_training_reads(tmp_path, capsys):
    """A prefix and a trainer's folder, through scripts/convert_checkpoint.py."""
    folder = tmp_path / "checkpoint-500"
    metadata = architecture.to_metadata(made.ARGS)
    folder.mkdir()
    save_file({f"transformer.{n}": t for n, t in BFL.items()}, folder / "model.sft", metadata)
    convert_command.main([str(folder), str(tmp_path / "out"), "--to", "diffusers", "--verify"])
    assert torch.equal(open_weights(tmp_path / "out").read(NAME), STATES[NAME])


# ---- architecture ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_shapes_tell_a_pruned_model(tmp_path, layout):
    """Two of nineteen double blocks of FLUX.1-dev: nothing but the shapes says so."""
    pruned = replace(FLAVORS["flux-dev"], depth=2, depth_single_blocks=3)
    shapes = foreign_shapes(pruned, layout_entries(layout, pruned))
    path = made.sparse(tmp_path / "pruned.safetensors", shapes)
    weights = open_weights(path)
    assert weights.args == pruned
    assert weights.format == layout
    assert open_weights(path, flavor=FLAVORS["flux-dev"]).args == pruned


def test_shapes_tell_a_model_of_single_blocks_alone(tmp_path):
    args = replace(FLAVORS["flux-schnell"], depth=0, depth_single_blocks=2)
    layouts: tuple[Layout, ...] = ("bfl", "diffusers")
    for layout in layouts:
        shapes = foreign_shapes(args, layout_entries(layout, args))
        found = open_weights(made.sparse(tmp_path / f"{layout}.safetensors", shapes)).args
        # without double blocks nobody can say whether theirs have a bias
        assert replace(found, qkv_bias=True) == args


def test_fill_canny_and_depth_are_named(tmp_path):
    dev = FLAVORS["flux-dev"]
    for features, name in ((384, "FLUX.1 Fill"), (128, "FLUX.1 Canny or Depth")):
        args = replace(dev, in_channels=features, depth=1, depth_single_blocks=1)
        shapes = foreign_shapes(args, layout_entries("bfl", args))
        path = made.sparse(tmp_path / f"{features}.safetensors", shapes)
        with pytest.raises(UnreadableWeights, match=rf"{name}.*not trained or drawn with here"):
            open_weights(path, replace(dev, depth=1, depth_single_blocks=1))
        weights = open_weights(path)
        assert weights.args == args, "a conversion keeps every value"
        with pytest.raises(UnreadableWeights, match=name):
            pipeline_plan(weights, None)


# ---- what is not there -----------------------------------------------------------------------


def test_a_broken_link_is_named(tmp_path, capsys):
    link = tmp_path / "flux1-dev.safetensors"
    link.symlink_to("gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"is a link to gone\.safetensors, which does not"):
        open_weights(link, made.ARGS)
    with pytest.raises(SystemExit):
        convert_command.main([str(link), str(tmp_path / "x"), "--to", "dcp"])
    assert "is a link to gone.safetensors" in capsys.readouterr().err


def test_a_link_within_a_folder_is_named(tmp_path):
    root = cache_of_the_hub(tmp_path)
    (root / "blobs" / "123").unlink()
    with pytest.raises(UnreadableWeights, match=r"is a link to .*blobs/123, which does not exist"):
        open_weights(root, made.ARGS)


def test_a_download_that_did_not_end(tmp_path):
    root = cache_of_the_hub(tmp_path)
    shutil.rmtree(root / "snapshots" / "abc" / "transformer")
    with pytest.raises(
        UnreadableWeights, match=r"without its folder transformer.*--repo_id black-"
    ):
        open_weights(root, made.ARGS)
    shutil.rmtree(root / "snapshots")
    with pytest.raises(UnreadableWeights, match=r"without any snapshot.*black-forest-labs/FLUX\.1"):
        open_weights(root, made.ARGS)
    with pytest.raises(UnreadableWeights, match=r"is a cache of the hub; give one .*models--black"):
        open_weights(root.parent, made.ARGS)


@pytest.mark.parametrize(
    "name",
    ["black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev/transformer", "https://huggingface.co/black-forest-labs/FLUX.1-dev",
     "https://huggingface.co/black-forest-labs/FLUX.1-dev/resolve/main/flux1-dev.safetensors"],
)  # fmt: skip
def test_a_name_on_the_hub_gets_the_command(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_cache, "HF_HUB_CACHE", str(tmp_path / "hub"))
    command = r"download_hf_assets\.py --repo_id black-forest-labs/FLUX\.1-dev --assets transformer"
    with pytest.raises(FileNotFoundError, match=command):
        open_weights(name, made.ARGS)
    cached = cache_of_the_hub(tmp_path / "hub")
    with pytest.raises(FileNotFoundError, match=rf"the hub's cache has it: name {cached}"):
        open_weights(name, made.ARGS)
    is_whole(cached, "diffusers")


def test_a_path_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("weights")
    for name in ("weights/absent", "models/flux1-dev.safetensors", "/a/b", "a/b/c"):
        with pytest.raises(FileNotFoundError) as error:
            open_weights(name, made.ARGS)
        assert str(error.value) == f"{name} does not exist"
