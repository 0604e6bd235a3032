"""Captions to the tokens of both text encoders."""

from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from tokenizers import Tokenizer
from torch import Tensor

from torchtitan_flux.encoders.pretrained import CLIP_KEY, T5_KEY, load_tokenizer, refusal

CLIP_LENGTH = 77
"""Tokens that CLIP reads, start and end of text included."""

_CACHED_CAPTIONS = 4096


class Unread(NamedTuple):
    """What an encoder does not read of a caption.

    Attributes:
        encoder: "T5" or "CLIP".
        tokens: of the whole caption, those that the encoder adds included.
        limit: how many are read.
        text: the end that is cut.
    """

    encoder: str
    tokens: int
    limit: int
    text: str


class CaptionTokenizer:
    """Tokenises a caption for T5 and CLIP, padded and truncated to fixed lengths.

    T5: pieces, end-of-sequence, then its padding token up to `max_t5_len`. CLIP: start of text,
    tokens, end of text, then its padding token up to 77. When a caption is too long its end is cut
    and the end token stays.

    Can be pickled, for the workers of a data loader; repeated captions are remembered, the most
    recent 4096 of them.
    """

    def __init__(self, t5_path: str | Path, clip_path: str | Path, max_t5_len: int) -> None:
        """Load both tokenizers from local folders or hub names; T5 gets `max_t5_len` tokens.

        Raises FileNotFoundError or ValueError, naming the TOML key, for one that cannot be loaded
        or is not of its kind.
        """
        if max_t5_len < 1:
            raise ValueError(
                f"encoder.max_t5_encoding_len: at least 1 token is needed, got {max_t5_len}"
            )
        t5 = load_tokenizer(t5_path, T5_KEY)
        clip = load_tokenizer(clip_path, CLIP_KEY)
        self.max_t5_len = max_t5_len
        self._t5 = _fixed_length(t5, max_t5_len)
        self._clip = _fixed_length(clip, CLIP_LENGTH)
        # The empty caption shows whether the two are what they were given for.
        if self._t5.encode("").ids[0] != t5.eos_token_id:
            raise refusal(T5_KEY, t5_path, "tokenizer", "it does not end captions as T5's does")
        if self._clip.encode("").ids[:2] != [clip.bos_token_id, clip.eos_token_id]:
            raise refusal(
                CLIP_KEY, clip_path, "tokenizer", "it does not start and end captions as CLIP's"
            )

    def __call__(self, caption: str) -> tuple[Int64[Tensor, " t5_len"], Int64[Tensor, "77"]]:
        """(T5 tokens of shape [max_t5_len], CLIP tokens of shape [77]), the caller's own copies."""
        t5, clip = self._tokens(caption)
        return t5.clone(), clip.clone()

    @cached_property
    def _tokens(self) -> Callable[[str], tuple[Tensor, Tensor]]:
        def encode(caption: str) -> tuple[Tensor, Tensor]:
            both = (self._t5.encode(caption).ids, self._clip.encode(caption).ids)
            return torch.tensor(both[0]), torch.tensor(both[1])

        return lru_cache(_CACHED_CAPTIONS)(encode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tokens"}

    def unread(self, caption: str) -> list[Unread]:
        """What is cut of a caption, for each encoder that does not read all of it."""
        found = []
        for name, tokenizer in (("T5", self._t5), ("CLIP", self._clip)):
            encoding = tokenizer.encode(caption)
            if not encoding.overflowing:
                continue
            further = [
                place
                for part in encoding.overflowing
                for place, added in zip(part.offsets, part.special_tokens_mask, strict=True)
                if not added
            ]
            tokens, limit = len(encoding.ids) + len(further), len(encoding.ids)
            found.append(Unread(name, tokens, limit, caption[further[0][0] :]))
        return found


def _fixed_length(tokenizer: Any, length: int) -> Tokenizer:
    """The tokenizers-library half of a transformers tokenizer, several times as fast as the whole.

    A copy, since truncation and padding are settings of the object.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(length)
    backend.enable_padding(
        length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token
    )
    return backend
