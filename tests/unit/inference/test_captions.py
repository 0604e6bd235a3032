"""What of a caption is not read is said, once for each caption and encoder."""

from pathlib import Path

import pytest

from torchtitan_flux.encoders.tokenizer import CaptionTokenizer
from torchtitan_flux.inference.captions import SHOWN, cut_captions

TINY = Path("assets/tiny")
LONG = "a red fox jumps over the lazy dog " * 3


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer(TINY / "t5", TINY / "clip", 16)


def test_what_is_read_whole_is_not_mentioned(tokenizer):
    assert list(cut_captions(["", "a red fox"], tokenizer)) == []


def test_the_end_that_is_cut_is_shown_with_the_key(tokenizer):
    (line,) = cut_captions([LONG, LONG], tokenizer)
    (unread,) = tokenizer.unread(LONG)
    assert unread.limit == 16
    for part in ("is cut for T5", f"{unread.tokens} tokens, 16 are", "max_t5_encoding_len"):
        assert part in line
    assert repr(unread.text[:40])[:-1] in line


def test_what_is_read_and_what_is_cut_are_the_caption(tokenizer):
    """By both encoders: the rest alone begins with the first token that was not read."""
    caption = "Ａ café — 円 " + "x1 y2 " * 40
    found = {one.encoder: one for one in tokenizer.unread(caption)}
    assert set(found) == {"T5", "CLIP"}
    for name, one in found.items():
        backend = {"T5": tokenizer._t5, "CLIP": tokenizer._clip}[name]
        assert caption.endswith(one.text)
        read = caption[: -len(one.text)]
        encoded = backend.encode(read)
        assert not encoded.overflowing
        # the last token but the end's may be the space before what is cut
        assert backend.encode(caption).ids[:-2] == encoded.ids[:-2], "it fits, and fills the length"
        whole = type(backend).from_str(backend.to_str())
        whole.no_truncation()
        whole.no_padding()
        assert one.tokens == len(whole.encode(caption).ids) > one.limit


def test_many_are_counted(tokenizer):
    lines = list(cut_captions([f"{i} {LONG}" for i in range(SHOWN + 3)], tokenizer))
    assert len(lines) == SHOWN + 1
    assert lines[-1] == "3 more captions are cut"
