"""Weights of T5 and CLIP where they lie: every key accounted for, by the header alone."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtitan_flux.encoders.pretrained import (
    CLIP_KEY,
    T5_KEY,
    read_clip_config,
    read_t5_config,
    refusal,
)
from torchtitan_flux.encoders.text_files import weight_files
from torchtitan_flux.encoders.tokenizer import CLIP_LENGTH
from torchtitan_flux.tensor_files.quantized import ScaledSource
from torchtitan_flux.tensor_files.safetensors_file import TensorsFile
from torchtitan_flux.tensor_files.sources import FilesSource, RenamedSource, Source
from torchtitan_flux.tensor_files.state_dict_keys import check_keys, shapes_of

_EMBEDDING = "shared."


class TextWeights:
    """The weights of a text encoder.

    Their names are those of transformers' models, but for CLIP's `text_model.`, which is left out,
    and T5's embedding, whose one tensor with two names is `shared.weight` here.

    Attributes:
        config: of the model.
        shapes: of every parameter, by name.
        scaled: whether some are stored as scaled float8.
    """

    def __init__(self, key: str, path: str | Path) -> None:
        """Compare what is there with what config.json asks for; of the values, nothing is read.

        Args:
            key: which encoder, `encoder.t5_encoder` or `encoder.clip_encoder`.
            path: local folder or hub name; a whole T5 or CLIP serves too.

        Raises FileNotFoundError or ValueError, which name the key and all that does not fit.
        """
        self._key, self._path, self._kind = key, path, _KINDS[key]
        self.config = self._kind.config(path)
        with torch.device("meta"):
            model = self._kind.model._from_config(self.config)
        self._theirs = {name: self._kind.renamed(name) for name in model.state_dict()}
        theirs = shapes_of(model.state_dict())
        self.shapes = {own: theirs[name] for name, own in self._theirs.items()}
        try:
            stored = FilesSource([TensorsFile.open(one) for one in weight_files(path, key)])
            named = RenamedSource(stored, _own_names(stored, self._kind))
            self._source = ScaledSource(named, "it")
            check_keys(self._source.shapes, self.shapes, "it")
        except (OSError, ValueError) as error:
            raise refusal(key, path, "weights", error) from None
        self.scaled = bool(self._source.scales)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A parameter as the numbers that it stands for, by its name in `shapes`.

        Raises ValueError where the file cannot be read, or `dtype` cannot hold a value.
        """
        try:
            return self._source.read(name, dtype)
        except (OSError, ValueError) as error:
            raise refusal(self._key, self._path, "weights", error) from None

    def load(self, device: torch.device | str, dtype: torch.dtype) -> Any:
        """transformers' model with these weights, which have been found to be all of them."""
        import transformers

        transformers.utils.logging.disable_progress_bar()  # one bar for each encoder and rank
        values = {name: self.read(name, dtype) for name in self.shapes}
        state = {name: values[own] for name, own in self._theirs.items()}
        model = self._kind.model.from_pretrained(
            None, config=self.config, state_dict=state, dtype=dtype
        )
        return model.to(device)


@dataclass(frozen=True)
class _Kind:
    """What makes T5's weights differ from CLIP's.

    Attributes:
        config: reads config.json.
        class_name: of transformers' model.
        alias: how a name in a file, or of transformers, may begin, and how it begins here.
        others: what a whole model has beside its text encoder.
    """

    config: Callable[[str | Path], Any]
    class_name: str
    alias: tuple[str, str]
    others: str

    @property
    def model(self) -> Any:
        """transformers' class, which takes seconds to import."""
        import transformers

        return getattr(transformers, self.class_name)

    def renamed(self, name: str) -> str:
        """The name used here."""
        theirs, own = self.alias
        return own + name.removeprefix(theirs) if name.startswith(theirs) else name


def _own_names(source: Source, kind: _Kind) -> dict[str, str]:
    """The encoder's tensors: the name used here -> the one in the file."""
    found: dict[str, str] = {}
    for name in source.shapes:
        own = kind.renamed(name)
        if re.match(kind.others, name):
            continue
        if (other := found.get(own)) is not None:
            same = all(of[other] == of[name] for of in (source.shapes, source.dtypes))
            if not (same and own.startswith(_EMBEDDING)):
                raise ValueError(f"{own} is there twice: {other} and {name}")
            if name != own:
                continue
        found[own] = name
    return found


def _clip_config(path: str | Path) -> Any:
    config = read_clip_config(path)
    tokens, eos = config.max_position_embeddings, config.eos_token_id
    if tokens < CLIP_LENGTH:
        why = f"it reads {tokens} tokens, needed are {CLIP_LENGTH}"
        raise refusal(CLIP_KEY, path, "text model", why)
    if not isinstance(eos, int):
        raise refusal(CLIP_KEY, path, "text model", f"its eos_token_id is {eos!r}, not a number")
    return config


_KINDS = {
    T5_KEY: _Kind(
        read_t5_config,
        "T5EncoderModel",
        ("encoder.embed_tokens.", _EMBEDDING),
        r"decoder\.|lm_head\.|spiece_model$",
    ),
    CLIP_KEY: _Kind(
        _clip_config,
        "CLIPTextModel",
        ("text_model.", ""),
        r"(vision_model|visual_projection|text_projection)\.|logit_scale$"
        r"|(text_model\.)?embeddings\.position_ids$",
    ),
}
