"""Captions that are longer than the text encoders read: what of them is cut."""

from collections.abc import Iterable, Iterator

from torchtitan_flux.encoders.tokenizer import CaptionTokenizer

SHOWN, LETTERS = 8, 60


def cut_captions(captions: Iterable[str], tokenizer: CaptionTokenizer) -> Iterator[str]:
    """A line for each caption and encoder that does not read all of it; of many, the first ones."""
    cut = 0
    for caption in dict.fromkeys(captions):
        found = tokenizer.unread(caption)
        cut += bool(found)
        for one in found if cut <= SHOWN else ():
            key = " (encoder.max_t5_encoding_len)" if one.encoder == "T5" else ""
            yield (
                f"{_shortened(caption)} is cut for {one.encoder}: it has {one.tokens} tokens, "
                f"{one.limit} are read{key}; not read: {_shortened(one.text)}"
            )
    if cut > SHOWN:
        yield f"{cut - SHOWN} more captions are cut"


def _shortened(text: str) -> str:
    return repr(text if len(text) <= LETTERS else f"{text[:LETTERS]}…")
