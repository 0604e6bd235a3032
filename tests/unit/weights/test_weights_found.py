"""The same weights as people have them: behind prefixes, in variants, folders of other programs."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
import torch.distributed.checkpoint as dcp
import weight_files as made
from safetensors.torch import save_file
from torch import Tensor

from torchtitan_flux.model import FLAVORS
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.tensor_files.state_dict_keys import KeyMismatch
from torchtitan_flux.weights import architecture, convert_command
from torchtitan_flux.weights.key_maps import foreign_shapes, layout_entries, to_layout
from torchtitan_flux.weights.open import open_weights

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"
STATES = made.state_dict(made.ARGS)
BFL, DIFFUSERS = to_layout("bfl", STATES, made.ARGS), to_layout("diffusers", STATES, made.ARGS)
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


BF16 = "diffusion_pytorch_model.bf16-0000{}-of-00002.safetensors"
BF16_INDEX = "diffusion_pytorch_model.safetensors.index.bf16.json"
FP16 = "diffusion_pytorch_model.fp16.safetensors"


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
    "bf16 in shards": (variant(BF16, index=BF16_INDEX), "diffusers"),
    "shards without index": (
        variant("diffusion_pytorch_model-0000{}-of-00002.safetensors"), "diffusers",
    ),
    "shards without config": (
        variant("model-0000{}-of-00002.safetensors", index="model.safetensors.index.json",
                with_config=False), "diffusers",
    ),
    "sft": (lambda path: save(path / "flux1-dev.sft", BFL), "bfl"),
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


def test_fill_canny_and_depth_are_converted_and_not_trained(tmp_path):
    dev = replace(FLAVORS["flux-dev"], depth=1, depth_single_blocks=1)
    args = replace(dev, in_channels=384)
    shapes = foreign_shapes(args, layout_entries("bfl", args))
    path = made.sparse(tmp_path / "fill.safetensors", shapes)
    with pytest.raises(KeyMismatch, match=r"img_in\.weight: \(3072, 384\), expected \(3072, 64\)"):
        open_weights(path, dev)
    assert open_weights(path).args == args, "a conversion keeps every value"


# ---- what is not there -----------------------------------------------------------------------


def test_a_broken_link_is_named(tmp_path):
    link = tmp_path / "flux1-dev.safetensors"
    link.symlink_to("gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"is a link to gone\.safetensors, which does not"):
        open_weights(link, made.ARGS)


def test_a_name_on_the_hub_gets_the_command_and_a_path_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = r"download_hf_assets\.py --repo_id black-forest-labs/FLUX\.1-dev --assets transformer"
    with pytest.raises(FileNotFoundError, match=command):
        open_weights("black-forest-labs/FLUX.1-dev", made.ARGS)
    (tmp_path / "weights").mkdir()
    for name in ("weights/absent", "models/flux1-dev.safetensors", "/a/b", "a/b/c"):
        with pytest.raises(FileNotFoundError) as error:
            open_weights(name, made.ARGS)
        assert str(error.value) == f"{name} does not exist"
