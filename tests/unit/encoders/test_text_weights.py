"""T5 and CLIP: every key and element type accounted for, scales applied, on every path."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest
import torch
from helpers import relative_l2
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig
from weight_files import SCALINGS, scaled_float8

from torchtitan_flux.config.job_config import Encoder, FluxJobConfig
from torchtitan_flux.encoders.checks import encoder_problems
from torchtitan_flux.encoders.pretrained import CLIP_KEY, T5_KEY
from torchtitan_flux.encoders.text import ClipEncoder, T5Encoder, TextWeights, files_in
from torchtitan_flux.encoders.tokenizer import CaptionTokenizer
from torchtitan_flux.inference.draw import low_memory_stages
from torchtitan_flux.inference.open_run import InferenceContext
from torchtitan_flux.model import FLAVORS

KEYS = {"t5": T5_KEY, "clip": CLIP_KEY}
BUILD = {"t5": T5Encoder, "clip": ClipEncoder}
CAPTIONS = ["a handwritten seven", "a large blue star on the left"]


def copy(tiny: Path, folder: Path, kind: str) -> tuple[Path, dict[str, Tensor]]:
    shutil.copytree(tiny / kind, folder)
    return folder, load_file(folder / "model.safetensors")


def save(folder: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> None:
    save_file(tensors, folder / "model.safetensors", metadata=header or {"format": "pt"})


def tokens(tiny: Path) -> dict[str, Tensor]:
    tokenizer = CaptionTokenizer(tiny / "t5", tiny / "clip", 13)
    t5, clip = zip(*map(tokenizer, CAPTIONS), strict=True)
    return {"t5": torch.stack(t5), "clip": torch.stack(clip)}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", KEYS)
def test_scaled_float8_is_read_as_the_numbers(kind: str, scaling: str, tiny, tmp_path: Path):
    scaled, state = copy(tiny, tmp_path / "scaled", kind)
    numbers, _ = copy(tiny, tmp_path / "numbers", kind)
    stored, header, values = scaled_float8(state, scaling)
    if kind == "t5":  # the tokenizer, inside ComfyUI's file
        stored["spiece_model"] = torch.arange(9, dtype=torch.uint8)
    save(scaled, stored, header)
    save(numbers, values)
    batch = tokens(tiny)[kind]
    found, expected = BUILD[kind](scaled), BUILD[kind](numbers)
    assert relative_l2(found(batch), expected(batch)) <= 1e-6
    for (name, ours), theirs in zip(
        found.model.named_parameters(), expected.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert relative_l2(found(batch), BUILD[kind](tiny / kind)(batch)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_streamed_path_encodes_the_same_bits(dtype: torch.dtype, tiny: Path, tmp_path: Path):
    t5, state = copy(tiny, tmp_path / "t5", "t5")
    save(t5, scaled_float8(state, "scale_weight")[0])
    clip, state = copy(tiny, tmp_path / "clip", "clip")
    save(clip, scaled_float8(state, "rows")[0])
    encoder = Encoder(t5_encoder=str(t5), clip_encoder=str(clip), max_t5_encoding_len=13)
    context = MagicMock(spec=InferenceContext, config=FluxJobConfig(encoder=encoder))
    context.args, context.device, context.dtype = FLAVORS["flux-tiny"], torch.device("cpu"), dtype
    with low_memory_stages(context).text() as encode:
        found = encode(CAPTIONS)
    batch = tokens(tiny)
    assert torch.equal(found.txt, T5Encoder(t5, dtype=dtype)(batch["t5"]))
    assert torch.equal(found.vec, ClipEncoder(clip, dtype=dtype)(batch["clip"]))


def test_a_whole_t5_and_both_names_of_the_embedding(tiny: Path, tmp_path: Path):
    """A decoder is left out; one tensor under two names, or under either, is one tensor."""
    folder, state = copy(tiny, tmp_path / "t5", "t5")
    batch = tokens(tiny)["t5"]
    expected = T5Encoder(tiny / "t5")(batch)
    shared = state["shared.weight"]
    for names in (["shared"], ["encoder.embed_tokens"], ["shared", "encoder.embed_tokens"]):
        given = {n: t for n, t in state.items() if n != "shared.weight"}
        given |= {f"{name}.weight": shared.clone() for name in names}
        given |= {"decoder.final_layer_norm.weight": torch.ones(32), "lm_head.weight": shared + 1}
        save(folder, given)
        encoder = T5Encoder(folder)
        assert torch.equal(encoder(batch), expected), names
        assert encoder.model.encoder.embed_tokens.weight is encoder.model.shared.weight


def test_a_tensor_that_is_there_twice(tiny: Path, tmp_path: Path):
    """Of the embedding's two names `shared` counts."""
    folder, state = copy(tiny, tmp_path / "t5", "t5")
    save(folder, {"encoder.embed_tokens.weight": torch.zeros_like(state["shared.weight"])} | state)
    assert torch.equal(T5Encoder(folder).model.shared.weight, state["shared.weight"])
    folder, state = copy(tiny, tmp_path / "clip", "clip")
    name = "final_layer_norm.weight"
    save(folder, {**state, name: state[f"text_model.{name}"] + 1})
    with pytest.raises(ValueError, match=rf"{name} is there twice"):
        TextWeights(CLIP_KEY, folder)


def in_files(folder: Path, state: dict[str, Tensor], *names: str, index: str = "") -> None:
    """The weights in so many files and, where it has a name, their index; no others."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    table = {}
    for i, file in enumerate(names):
        mine = {name: state[name] for name in list(state)[i :: len(names)]}
        save_file(mine, folder / file)
        table |= dict.fromkeys(mine, file)
    if index:
        (folder / index).write_text(json.dumps({"weight_map": table}))


def shards(variant: str, count: int) -> list[str]:
    return [f"model{variant}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def test_shards_by_their_index(tiny: Path, tmp_path: Path):
    """The scale of a weight may lie in another file."""
    folder, state = copy(tiny, tmp_path / "t5", "t5")
    stored, _, _ = scaled_float8(state, "comfy_quant")
    save(folder, stored)
    expected = T5Encoder(folder)(tokens(tiny)["t5"])
    in_files(folder, stored, *shards("", 2), index="model.safetensors.index.json")
    assert torch.equal(T5Encoder(folder)(tokens(tiny)["t5"]), expected)


VARIANTS = {
    "one file": (["model.fp16.safetensors"], ""),
    "shards": (shards(".fp16", 3), "model.safetensors.index.fp16.json"),
    "no index": (shards(".fp16", 2), ""),
    "plain, no index": (shards("", 2), ""),
}


@pytest.mark.parametrize("case", VARIANTS)
@pytest.mark.parametrize("kind", KEYS)
def test_a_variant_is_read_where_the_plain_files_are_not(kind: str, case: str, tiny, tmp_path):
    folder, state = copy(tiny, tmp_path / "x", kind)
    shutil.copytree(folder, tmp_path / "plain")
    names, index = VARIANTS[case]
    variant = {name: (tensor * 2).half() for name, tensor in state.items()}
    in_files(folder, variant, *names, index=index)
    assert not list(encoder_problems(configured(kind, folder, tiny), pixel_space=True))
    save(tmp_path / "plain", variant)
    expected = BUILD[kind](tmp_path / "plain").state_dict()
    for name, tensor in BUILD[kind](folder).state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    if "plain" not in case:
        save(folder, state)
        assert files_in(folder) == ([folder / "model.safetensors"], None)


def configured(kind: str, folder: Path, tiny: Path) -> FluxJobConfig:
    paths = {f"{name}_encoder": str(tiny / name) for name in KEYS}
    return FluxJobConfig(encoder=Encoder(**paths | {f"{kind}_encoder": str(folder)}))


WRONG_FILES = {
    "two variants": (
        ["model.bf16.safetensors", "model.fp16.safetensors"],
        r"safetensors there: model\.bf16\.safetensors, model\.fp16\.safetensors",
    ),
    "part of the shards": (shards(".fp16", 3)[:2], r"00001-of-00003.*, 2 of 3 files; get the oth"),
    "another name": (["t5xxl_fp16.safetensors"], r"safetensors there: t5xxl_fp16\.safetensors"),
    "pickles": ([], r"safetensors there: none \(pickles"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_files_that_are_no_encoder_alone(case: str, tiny: Path, tmp_path: Path):
    folder, state = copy(tiny, tmp_path / "x", "t5")
    names, message = WRONG_FILES[case]
    in_files(folder, state, *names)
    (folder / "pytorch_model.bin").touch()
    (problem,) = encoder_problems(configured("t5", folder, tiny), pixel_space=True)
    assert re.match(rf"encoder\.t5_encoder: cannot load.*{message}", str(problem))
    with pytest.raises(ValueError, match=rf"^encoder\.t5_encoder: cannot load.*{message}"):
        T5Encoder(folder)


def test_damage_in_a_shard_of_a_variant_is_named(tiny: Path, tmp_path: Path):
    folder, state = copy(tiny, tmp_path / "x", "t5")
    names = shards(".fp16", 2)
    in_files(folder, state, *names, index="model.safetensors.index.fp16.json")
    last = folder / names[1]
    last.write_bytes(last.read_bytes()[:-7])
    (found,) = encoder_problems(configured("t5", folder, tiny), pixel_space=True)
    assert f"{last} is no safetensors file" in found.message
    last.unlink()
    last.symlink_to("gone")
    (found,) = encoder_problems(configured("t5", folder, tiny), pixel_space=True)
    assert f"{last.name}, which is a link to gone, which does not" in found.message


def test_the_plain_files_of_a_repository_are_fetched(monkeypatch, tiny: Path):
    def fetch(repository: str, allow_patterns: list[str]) -> str:
        assert (repository, allow_patterns[0]) == ("owner/t5", "model.safetensors")
        return str(tiny / "t5")

    expected = T5Encoder(tiny / "t5")(tokens(tiny)["t5"])
    monkeypatch.setattr("torchtitan_flux.encoders.text.snapshot_download", fetch)
    config = PretrainedConfig.get_config_dict(tiny / "t5")
    monkeypatch.setattr(PretrainedConfig, "get_config_dict", lambda *_args, **_more: config)
    assert torch.equal(T5Encoder("owner/t5")(tokens(tiny)["t5"]), expected)


Q = "encoder.block.1.layer.0.SelfAttention.q"
FC = "text_model.encoder.layers.1.mlp.fc1"

WRONG: list[tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    ("t5", lambda s: {**s, "encoder.block.2.x.weight": torch.ones(2)}, r"1 unknown: .*block\.2\.x"),
    ("t5", lambda s: {n: t for n, t in s.items() if Q not in n}, rf"1 missing: {Q}\.weight"),
    ("t5", lambda s: {**s, f"{Q}.weight": torch.ones(3, 32)}, r"1 mis-shaped: .*q\.weight: \(3,"),
    ("t5", lambda s: {**s, f"{Q}.weight": s[f"{Q}.weight"].to(torch.int8)}, r"quantised weights"),
    ("t5", lambda s: {**s, f"{Q}.SCB": torch.ones(32)}, r"quantised weights \(.*q\.SCB"),
    ("clip", lambda s: {**s, "text_model.x.weight": torch.ones(2)}, r"1 unknown: x\.weight"),
    ("clip", lambda s: {n: t for n, t in s.items() if f"{FC}.b" not in n}, r"missing: .*fc1\.bias"),
]


@pytest.mark.parametrize(("kind", "change", "message"), WRONG)
def test_what_transformers_leaves_out_or_makes_up(
    kind: str, change, message: str, tiny: Path, tmp_path: Path
):
    folder, state = copy(tiny, tmp_path / "x", kind)
    save(folder, change(state))
    said = rf"^encoder\.{kind}_encoder: cannot load the weights from .*{message}"
    with pytest.raises(ValueError, match=said):
        BUILD[kind](folder)


@pytest.mark.parametrize("kind", KEYS)
def test_a_configuration_that_names_a_quantisation(kind: str, tiny: Path, tmp_path: Path):
    folder, _ = copy(tiny, tmp_path / "x", kind)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{kind}_encoder: .*quantised .*bitsandbytes"):
        TextWeights(KEYS[kind], folder)


def test_float64_beyond_the_range_is_refused(tiny: Path, tmp_path: Path):
    folder, state = copy(tiny, tmp_path / "x", "t5")
    wide = {name: tensor.double() for name, tensor in state.items()}
    save(folder, wide)
    batch = tokens(tiny)["t5"]
    assert torch.equal(T5Encoder(folder)(batch), T5Encoder(tiny / "t5")(batch))
    wide[f"{Q}.weight"][3, 4] = -1e300
    save(folder, wide)
    with pytest.raises(ValueError, match=rf"{Q}\.weight has values that torch.* cannot hold"):
        T5Encoder(folder, dtype=torch.bfloat16)
