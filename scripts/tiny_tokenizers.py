"""The tokenizers of the tiny encoders, for scripts/make_tiny_assets.py.

    python scripts/make_tiny_assets.py

Small vocabularies that know the words of this project's captions whole and spell out all other
text.
"""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

WORDS = """
a an the of on in at is are and or with to from by for no not it its this that
handwritten digit digits number numbers letter letters written drawn printed
zero one two three four five six seven eight nine ten
red green blue yellow orange purple pink brown black white grey gray cyan magenta violet
circle square triangle star cross ring diamond heart line dot shape shapes
small large tiny big medium huge little
top bottom left right centre center upper lower middle corner edge side
above below under over near beside inside outside behind between front
background foreground photo picture image drawing painting sketch photograph illustration
dark light bright plain colour color coloured colored
dog cat bird horse fish cow sheep man woman child people person boy girl
house tree flower car bus train boat plane bicycle street road city town
sky sun moon cloud clouds sea water river lake mountain hill field grass snow sand beach forest
table chair bed room window door wall floor kitchen food cake fruit apple
standing sitting walking running looking holding wearing riding playing flying
old new young long short high low round flat open closed empty full many few some several
day night morning evening summer winter hot cold wet dry
hat shirt dress hand head face eye eyes hair
""".split()  # noqa: SIM905 (a list of 200 quoted words is no easier to read)
"""Known to both tokenizers as whole words."""

SUFFIXES = ["es", "ed", "ing", "er", "ly", "en", "est", "ness", "ment", "tion", "al"]
FURTHER_LETTERS = "àáâäãåæçèéêëìíîïñòóôöõøœßùúûüÿ–—‘’“”…°×£€"
"""Letters and punctuation beyond ASCII that English captions hold now and then."""


@dataclass(frozen=True)
class TinyTokenizer:
    """Files of a tokenizer folder (name -> text), and how many ids it can give."""

    files: dict[str, str]
    vocabulary: int


def t5_tokenizer() -> TinyTokenizer:
    """Unigram pieces like T5's: <pad> 0, </s> 1, <unk> 2, words marked by a leading ▁.

    Like T5's it has no byte fallback: transformers 5 would not honour one in a T5 tokenizer.
    """
    capitals = ["A", "An", "The", "Photo", "Picture", "Image"]
    characters = [chr(code) for code in range(33, 127)] + list(FURTHER_LETTERS)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    # Scores are log probabilities: one whole word is always likelier than its letters.
    pieces += [
        (f"▁{word}", -5.0 - rank / 128)
        for rank, word in enumerate([*dict.fromkeys(WORDS), *capitals])
    ]
    pieces += [(suffix, -8.0) for suffix in SUFFIXES]
    pieces += [(character, -10.0) for character in characters]

    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": 512,
        "extra_ids": 0,
        **special,
    }
    files = {
        "tokenizer.json": _dump(json.loads(tokenizer.to_str())),
        "tokenizer_config.json": _dump(config, indent=2),
        "special_tokens_map.json": _dump(special, indent=2),
    }
    return TinyTokenizer(files, len(pieces))


def clip_tokenizer() -> TinyTokenizer:
    """Byte-level BPE like CLIP's: lower case, words end in </w>, the two marks are the last ids."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges()
    tokens = [*bytes_, *(byte + "</w>" for byte in bytes_), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    start, end = len(tokens) - 2, len(tokens) - 1

    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            merges,
            unk_token="<|endoftext|>",
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = _clip_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", end),
        ("<|startoftext|>", start),
        trim_offsets=False,
        add_prefix_space=False,
    )
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
        **special,
    }
    merge_lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    files = {
        "tokenizer.json": _dump(json.loads(tokenizer.to_str())),
        "tokenizer_config.json": _dump(config, indent=2),
        "special_tokens_map.json": _dump(special, indent=2),
        "vocab.json": _dump(vocabulary),
        "merges.txt": "\n".join(merge_lines) + "\n",
    }
    return TinyTokenizer(files, len(tokens))


def _clip_pre_tokenizer() -> pre_tokenizers.Sequence:
    """Contractions, runs of letters, single digits and runs of signs, then bytes, as CLIP's."""
    parts = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(parts, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _merges() -> list[tuple[str, str]]:
    """Byte-pair merges, learned from WORDS until each of them is one token.

    The trainer of the tokenizers library breaks ties by chance; here the first pair in
    alphabetical order wins.
    """
    words = [[*word[:-1], word[-1] + "</w>"] for word in dict.fromkeys(WORDS)]
    merges = []
    while counts := Counter(pair for word in words for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        words = [_merged(word, best) for word in words]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in word:
        # A symbol just merged is longer than the pair's first half, hence no part of a new pair.
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def _dump(content: object, indent: int | None = None) -> str:
    separators = (",", ":") if indent is None else None
    return json.dumps(content, ensure_ascii=False, indent=indent, separators=separators) + "\n"
