"""Captions to the tokens of both text encoders."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from tokenizers import Tokenizer
from torch import Tensor

from torchtitan_flux.encoders.pretrained import CLIP_KEY, T5_KEY, load_tokenizer, refusal

CLIP_LENGTH = 77
"""Tokens that CLIP reads, start and end of text included."""


class CaptionTokenizer:
    """Tokenises a caption for T5 and CLIP, padded and truncated to fixed lengths.

    T5: pieces, end-of-sequence, then its padding token up to `max_t5_len`. CLIP: start of text,
    tokens, end of text, then its padding token up to 77. When a caption is too long its end is cut
    and the end token stays.

    Can be pickled, for the workers of a data loader.
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
        """(T5 tokens of shape [max_t5_len], CLIP tokens of shape [77])."""
        t5, clip = self._t5.encode(caption), self._clip.encode(caption)
        return torch.tensor(t5.ids), torch.tensor(clip.ids)

    def cut(self, caption: str) -> dict[str, tuple[int, int]]:
        """Encoders that do not read all of a caption: the tokens that it has, and those read."""
        limits = {"T5": self.max_t5_len, "CLIP": CLIP_LENGTH}
        counts = (len(tokenizer.encode(caption).ids) for tokenizer in self._whole)
        found = zip(limits.items(), counts, strict=True)
        return {name: (count, limit) for (name, limit), count in found if count > limit}

    @cached_property
    def _whole(self) -> tuple[Tokenizer, Tokenizer]:
        """The two tokenizers without a limit."""
        both = Tokenizer.from_str(self._t5.to_str()), Tokenizer.from_str(self._clip.to_str())
        for tokenizer in both:
            tokenizer.no_truncation()
            tokenizer.no_padding()
        return both


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
