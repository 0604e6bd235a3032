"""T5 and CLIP against transformers and diffusers' FluxPipeline."""

import json
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from helpers import relative_l2
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)

from torchtitan_flux.encoders.pretrained import text_widths
from torchtitan_flux.encoders.text import ClipEncoder, T5Encoder
from torchtitan_flux.encoders.tokenizer import CaptionTokenizer
from torchtitan_flux.paths import is_hub_name, looks_local

PROMPTS = [
    "",
    "a handwritten seven",
    "A red Circle, on the left!\n  #42 {x} ~^|\\ it's a café – 日本",
    "photo of a large blue star " * 30,
]
T5_LENGTH = 53


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> CaptionTokenizer:
    return CaptionTokenizer(tiny / "t5", tiny / "clip", T5_LENGTH)


def tokens(tokenizer: CaptionTokenizer, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    t5, clip = zip(*map(tokenizer, prompts), strict=True)
    return torch.stack(t5), torch.stack(clip)


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> FluxPipeline:
    return FluxPipeline(
        scheduler=None,
        vae=None,
        text_encoder=CLIPTextModel.from_pretrained(tiny / "clip", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(tiny / "clip"),
        text_encoder_2=T5EncoderModel.from_pretrained(tiny / "t5", dtype=torch.float32),
        tokenizer_2=T5TokenizerFast.from_pretrained(tiny / "t5"),
        transformer=None,
    )


@pytest.mark.parametrize("prompt", PROMPTS, ids=["empty", "digit", "signs", "long"])
def test_same_as_the_pipeline_of_diffusers(pipeline, tokenizer, tiny: Path, prompt: str):
    expected, expected_pooled, _ = pipeline.encode_prompt(
        prompt, prompt, device="cpu", max_sequence_length=T5_LENGTH
    )
    t5, clip = tokens(tokenizer, [prompt])
    assert relative_l2(T5Encoder(tiny / "t5")(t5), expected) <= 1e-6
    assert relative_l2(ClipEncoder(tiny / "clip")(clip), expected_pooled) <= 1e-6


def test_batch_equals_one_by_one(tokenizer, tiny: Path):
    t5, clip = tokens(tokenizer, PROMPTS)
    for encoder, batch in ((T5Encoder(tiny / "t5"), t5), (ClipEncoder(tiny / "clip"), clip)):
        together = encoder(batch)
        assert together.shape[0] == 4
        assert together.shape[-1] == encoder.width == 32
        for i in range(4):
            assert relative_l2(encoder(batch[i : i + 1])[0], together[i]) <= 1e-6


def test_tokens_have_fixed_lengths_and_ends(tokenizer):
    t5, clip = tokens(tokenizer, PROMPTS)
    assert (t5.shape, clip.shape) == ((4, T5_LENGTH), (4, 77))
    assert t5.dtype == clip.dtype == torch.int64
    start, end = clip[0, :2].tolist()
    assert t5[0].tolist() == [1] + [0] * (T5_LENGTH - 1)
    assert clip[0].tolist() == [start] + [end] * 76
    assert t5[1].count_nonzero() <= 6  # "a handwritten seven" and the end
    assert (t5[1] == 1).nonzero().item() == t5[1].count_nonzero() - 1
    # Cut at the end, whose mark stays.
    assert (t5[3] == 1).nonzero().flatten().tolist() == [T5_LENGTH - 1]
    assert (clip[3] == end).nonzero().flatten().tolist() == [76]


def test_pickled_for_workers_and_counted_whole(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    for prompt in PROMPTS:
        for ours, theirs in zip(again(prompt), tokenizer(prompt), strict=True):
            assert torch.equal(ours, theirs)
    assert again.cut(PROMPTS[1]) == {}
    cut = again.cut(PROMPTS[3])
    assert {name: limit for name, (_, limit) in cut.items()} == {"T5": T5_LENGTH, "CLIP": 77}
    assert min(tokens for tokens, _ in cut.values()) > 77


def save_clip(tiny: Path, folder: Path, **changes: object) -> Path:
    """A copy of the tiny CLIP with another configuration."""
    shutil.copytree(tiny / "clip", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_legacy_end_of_text_id_of_openai(tokenizer, tiny: Path, tmp_path: Path):
    """Their config.json says 2, their tokenizer writes the highest id."""
    legacy = save_clip(tiny, tmp_path / "clip", eos_token_id=2, bos_token_id=0, pad_token_id=1)
    _, clip = tokens(tokenizer, PROMPTS)
    clip[1, 1] = 2  # an ordinary token that must not pass for the end
    pooled = ClipEncoder(legacy)(clip)
    assert torch.equal(pooled, ClipEncoder(tiny / "clip")(clip))
    model = CLIPTextModel.from_pretrained(legacy, dtype=torch.float32)
    assert relative_l2(pooled, model(clip).pooler_output) <= 1e-6


def test_a_whole_clip_serves_too(tokenizer, tiny: Path, tmp_path: Path):
    text = CLIPTextConfig.from_pretrained(tiny / "clip").to_dict()
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).float()
    whole.save_pretrained(tmp_path)
    _, clip = tokens(tokenizer, PROMPTS)
    expected = whole.eval().text_model(clip).pooler_output
    assert relative_l2(ClipEncoder(tmp_path)(clip), expected.detach()) <= 1e-6
    assert text_widths(tiny / "t5", tmp_path) == (32, 32)


@pytest.mark.parametrize(("which", "build"), enumerate([T5Encoder, ClipEncoder]))
def test_frozen_in_the_dtype_asked_for(which: int, build, tokenizer, tiny: Path):
    batch, path = tokens(tokenizer, PROMPTS)[which], tiny / ("t5", "clip")[which]
    exact, half = build(path), build(path, "cpu", torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in half.parameters())
    assert not any(module.training for module in half.modules())
    assert half(batch).dtype == torch.bfloat16
    assert exact(batch).dtype == torch.float32
    assert 0 < relative_l2(half(batch), exact(batch)) <= 5e-2


def test_blocks_are_those_of_t5(tiny: Path):
    encoder = T5Encoder(tiny / "t5")
    blocks = encoder.blocks()
    assert len(blocks) == 2
    in_blocks = sum(p.numel() for block in blocks for p in block.parameters())
    outside = encoder.model.shared.weight.numel() + 32  # embedding and final norm
    assert in_blocks == sum(p.numel() for p in encoder.parameters()) - outside


def test_local_folders_need_no_network(tiny: Path, monkeypatch):
    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("a local folder was looked up on the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    CaptionTokenizer(tiny / "t5", tiny / "clip", 8)
    assert text_widths(str(tiny / "t5"), str(tiny / "clip")) == (32, 32)
    T5Encoder(str(tiny / "t5"))
    ClipEncoder(str(tiny / "clip"))


def test_tokenizers_of_a_diffusers_repository(tiny: Path, tokenizer, tmp_path: Path):
    """`text_encoder` and `text_encoder_2` hold no tokenizer; those lie beside them."""
    for source, encoder, beside in (
        ("clip", "text_encoder", "tokenizer"),
        ("t5", "text_encoder_2", "tokenizer_2"),
    ):
        shutil.copytree(tiny / source, tmp_path / encoder)
        (tmp_path / beside).mkdir()
        for file in (tmp_path / encoder).iterdir():
            if file.name not in ("config.json", "model.safetensors"):
                file.rename(tmp_path / beside / file.name)
    there = CaptionTokenizer(tmp_path / "text_encoder_2", tmp_path / "text_encoder", T5_LENGTH)
    for ours, theirs in zip(there(PROMPTS[2]), tokenizer(PROMPTS[2]), strict=True):
        assert torch.equal(ours, theirs)


def test_names_of_the_hub_follow_its_own_rule():
    for name, possible in (
        ("google/t5-v1_1-xxl", True),
        ("gpt2", True),
        ("-x/y", False),
        ("owner/..", False),
        ("a/b/c", False),
        ("owner/na--me", False),
        ("assets/hf", True),
    ):
        assert is_hub_name(name) == possible, name
        assert looks_local(name) == (not possible or name.startswith("assets/")), name


@pytest.mark.parametrize("bad", ["/nowhere/t5", "some/folder/deep", "surely/not-there", "-x/y"])
def test_paths_that_lead_nowhere_are_named(tiny: Path, bad: str):
    t5, clip = tiny / "t5", tiny / "clip"
    for key, call in (
        ("t5", lambda: CaptionTokenizer(bad, clip, 8)),
        ("clip", lambda: ClipEncoder(bad)),
        ("t5", lambda: text_widths(bad, clip)),
        ("clip", lambda: text_widths(t5, bad)),
    ):
        said = rf"^encoder\.{key}_encoder: .*{bad}"
        with pytest.raises((FileNotFoundError, ValueError), match=said):
            call()


def test_the_other_encoder_is_refused(tiny: Path):
    t5, clip = tiny / "t5", tiny / "clip"
    for key, call in (
        ("t5", lambda: CaptionTokenizer(clip, clip, 8)),
        ("clip", lambda: CaptionTokenizer(t5, t5, 8)),
        ("t5", lambda: T5Encoder(clip)),
        ("clip", lambda: text_widths(t5, tiny / "vae")),
    ):
        with pytest.raises(ValueError, match=rf"^encoder\.{key}_encoder: cannot load the"):
            call()


@pytest.mark.parametrize(
    ("change", "because"),
    [({"max_position_embeddings": 64}, "reads 64 tokens"), ({"eos_token_id": None}, "with None")],
)
def test_a_clip_that_cannot_serve_is_refused(tiny: Path, tmp_path: Path, change, because: str):
    with pytest.raises(ValueError, match=rf"encoder\.clip_encoder: .*{because}"):
        ClipEncoder(save_clip(tiny, tmp_path / "clip", **change))


def test_length_zero_is_refused(tiny: Path):
    with pytest.raises(ValueError, match=r"encoder\.max_t5_encoding_len"):
        CaptionTokenizer(tiny / "t5", tiny / "clip", 0)
