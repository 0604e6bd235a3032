"""The options of run_infer.sh: documented, in range, known; what captions and pipelines bring."""

import re
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import pytest

from torchtitan_flux.config.problems import ConfigError
from torchtitan_flux.encoders.tokenizer import CaptionTokenizer
from torchtitan_flux.inference.options import parse
from torchtitan_flux.inference.requested import SHOWN, cut_captions

REPO = Path(__file__).resolve().parents[3]
TINY = Path("assets/tiny")
LONG = "a red fox jumps over the lazy dog " * 3


def test_every_option_is_in_the_guide(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    options = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    guide = (REPO / "docs" / "inference.md").read_text(encoding="utf-8")
    table = set(re.findall(r"^\| `(--[\w-]+)", guide, re.MULTILINE))
    assert options - {"--help", "--section", "--low-memory"} == table


@pytest.mark.parametrize(
    ("option", "invalid"),
    [
        *(("steps", ("0", "10001")), ("count", ("-1", "10001")), ("seed", ("-2",))),
        *(("cfg", ("nan", "inf", "-1")), ("guidance", ("nan", "inf", "-0.5"))),
        *(("out", ("",)), ("prompts", ("",)), ("size", ("",))),
    ],
)
def test_values_that_can_never_be_drawn_with_are_refused_at_once(option, invalid):
    for value in invalid:
        with pytest.raises(ConfigError, match=f"--{option} {value or 'is empty'}"):
            parse(["--prompt", "a", f"--{option}", value])


def test_all_problems_are_in_one_message():
    with pytest.raises(ConfigError) as refused:
        parse(["--prompt", "a", "--cfg", "nan", "--steps", "0", "--height", "512", "--sed", "3"])
    assert len(refused.value.found) == 4
    with pytest.raises(ConfigError, match="not written in UTF-8"):
        parse(["--prompt", "a\udcff"])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--height", "--size HEIGHTxWIDTH"),
        ("--num-images-per-prompt", "--count N"),
        ("--num_inference_steps", "--steps"),
        ("--guidance_scale", "--cfg"),
        ("--negative_prompt", "--negative"),
        ("--output", "--out"),
        ("--from_png", "did you mean --from-png"),
        ("--promt", "did you mean --prompt"),
        ("--xyzzy", "--help lists"),
    ],
)
def test_options_of_other_programs_point_to_ours(given, meant):
    with pytest.raises(ConfigError, match=f"{given.replace('-', '.')} is unknown: .*{meant}"):
        parse(["--prompt", "a", given, "8"])


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer(TINY / "t5", TINY / "clip", 16)


def test_captions_that_are_cut_are_named_with_the_unread_end_and_the_key(tokenizer):
    assert list(cut_captions(["", "a red fox"], tokenizer)) == []
    (line,) = cut_captions([LONG, LONG], tokenizer)
    (unread,) = tokenizer.unread(LONG)
    assert unread.limit == 16
    for part in ("is cut for T5", f"{unread.tokens} tokens, 16 are", "max_t5_encoding_len"):
        assert part in line
    assert repr(unread.text[:40])[:-1] in line
    lines = list(cut_captions([f"{i} {LONG}" for i in range(SHOWN + 3)], tokenizer))
    assert len(lines) == SHOWN + 1
    assert lines[-1] == "3 more captions are cut"


def test_what_is_read_and_what_is_cut_are_the_caption(tokenizer):
    """By both encoders: the rest alone begins with the first token that was not read."""
    caption = "Ａ café — 円 " + "x1 y2 " * 40
    found = {one.encoder: one for one in tokenizer.unread(caption)}
    assert set(found) == {"T5", "CLIP"}
    for name, one in found.items():
        backend = {"T5": tokenizer._t5, "CLIP": tokenizer._clip}[name]
        assert caption.endswith(one.text)
        encoded = backend.encode(caption[: -len(one.text)])
        assert not encoded.overflowing
        # the last token but the end's may be the space before what is cut
        assert backend.encode(caption).ids[:-2] == encoded.ids[:-2], "it fits, and fills the length"
        whole = type(backend).from_str(backend.to_str())
        whole.no_truncation()
        whole.no_padding()
        assert one.tokens == len(whole.encode(caption).ids) > one.limit
