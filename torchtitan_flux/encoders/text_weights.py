"""Weights of T5 and CLIP where they lie: every key accounted for, by the header alone."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from torchtitan_flux.encoders.pretrained import (
    CLIP_KEY,
    T5_KEY,
    read_clip_config,
    read_t5_config,
    refusal,
)
from torchtitan_flux.encoders.stored import StoredTensor, read_header, read_stored
from torchtitan_flux.encoders.text_files import weight_files
from torchtitan_flux.encoders.tokenizer import CLIP_LENGTH
from torchtitan_flux.tensor_files.element_types import cast
from torchtitan_flux.tensor_files.quantized import check_integers, dequantized, find_scales
from torchtitan_flux.tensor_files.state_dict_keys import check_keys

Stored = Callable[[Path, str], Tensor]
"""(file, name in it) -> values as they are stored."""

Shapes = dict[str, tuple[int, ...]]

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

    def __init__(
        self, key: str, path: str | Path, stored: Stored = read_stored, flag: str = ""
    ) -> None:
        """Compare what is there with what config.json asks for; of the values, nothing is read.

        Args:
            key: which encoder, `encoder.t5_encoder` or `encoder.clip_encoder`.
            path: local folder or hub name; a whole T5 or CLIP serves too.
            stored: how values are read.
            flag: for messages, in place of the key.

        Raises:
            FileNotFoundError, ValueError: names the key, and all that is missing, unknown, of
                another shape or no floating-point numbers, or the quantisation that is not read;
                a CLIP that reads fewer than 77 tokens or has no end-of-text token.
        """
        self._kind = _KINDS[key]
        self._key, self._path, self._stored = flag or key, path, stored
        self.config = self._kind.config(path)
        self.shapes = self._kind.shapes(self.config)
        try:
            self._tensors, headers = _headers(weight_files(path, key), self._kind)
            dtypes = {name: one.dtype for name, one in self._tensors.items()}
            shapes = {name: one.shape for name, one in self._tensors.items()}
            scales = find_scales(dtypes, shapes, headers, self._raw)
            own = [name for name in shapes if name not in scales.beside]
            found = {name: torch.empty(shapes[name], device="meta") for name in own}
            check_keys(found, self.shapes, "it")
            check_integers({name: dtypes[name] for name in own})
        except (OSError, ValueError, SafetensorError) as error:
            raise refusal(self._key, path, "weights", error) from None
        self._scales = scales.of
        self.scaled = bool(scales.of)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A parameter as the numbers that it stands for.

        Args:
            name: as in `shapes`, or as transformers has it.
            dtype: of the result.

        Raises:
            KeyError: there is no such parameter.
            ValueError: the file cannot be read, or `dtype` cannot hold a value.
        """
        name = self.own_name(name)
        scale = self._scales.get(name)
        try:
            values = self._raw(name)
            if scale is not None:
                values = dequantized(values, self._raw(scale), slice(None), scale)
            return cast(values, dtype, name)
        except (OSError, ValueError, SafetensorError) as error:
            raise refusal(self._key, self._path, "weights", error) from None

    def own_name(self, name: str) -> str:
        """The name in `shapes` of what transformers, or a file, calls `name`."""
        return self._kind.renamed(name)

    def _raw(self, name: str) -> Tensor:
        return self._stored(self._tensors[name].file, self._tensors[name].name)


# ---- what is in a file ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """What makes T5's weights differ from CLIP's.

    Attributes:
        config: reads config.json.
        shapes: configuration -> shape of every parameter.
        renamed: a name in a file or of transformers -> the one used here.
        others: what a whole model has beside its text encoder.
    """

    config: Callable[[str | Path], Any]
    shapes: Callable[[Any], Shapes]
    renamed: Callable[[str], str]
    others: re.Pattern[str]


def _headers(
    files: list[Path], kind: _Kind
) -> tuple[dict[str, StoredTensor], list[dict[str, str]]]:
    """The encoder's tensors by the names used here, and the strings beside them."""
    found: dict[str, StoredTensor] = {}
    headers = []
    for file in files:
        tensors, strings = read_header(file)
        headers.append(strings)
        for name, tensor in tensors.items():
            ours = kind.renamed(name)
            if kind.others.match(name):
                continue
            if (other := found.get(ours)) is not None:
                same = (other.shape, other.dtype) == (tensor.shape, tensor.dtype)
                if other.name == name or not (same and ours.startswith(_EMBEDDING)):
                    raise ValueError(f"{ours} is there twice: {other.name} and {name} in {file}")
                if name != ours:
                    continue
            found[ours] = tensor
    return found, headers


def _t5_shapes(config: Any) -> Shapes:
    width, inner = config.d_model, config.num_heads * config.d_kv
    shapes: Shapes = {
        "shared.weight": (config.vocab_size, width),
        "encoder.final_layer_norm.weight": (width,),
    }
    attention = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shapes[attention] = (config.relative_attention_num_buckets, config.num_heads)
    for i in range(config.num_layers):
        layer = f"encoder.block.{i}.layer"
        shapes |= {f"{layer}.0.SelfAttention.{one}.weight": (inner, width) for one in "qkv"}
        shapes[f"{layer}.0.SelfAttention.o.weight"] = (width, inner)
        for one in ("wi_0", "wi_1") if config.is_gated_act else ("wi",):
            shapes[f"{layer}.1.DenseReluDense.{one}.weight"] = (config.d_ff, width)
        shapes[f"{layer}.1.DenseReluDense.wo.weight"] = (width, config.d_ff)
        shapes |= {f"{layer}.{j}.layer_norm.weight": (width,) for j in (0, 1)}
    return shapes


def _clip_config(path: str | Path) -> Any:
    config = read_clip_config(path)
    tokens, eos = config.max_position_embeddings, config.eos_token_id
    if tokens < CLIP_LENGTH:
        why = f"it reads {tokens} tokens, needed are {CLIP_LENGTH}"
        raise refusal(CLIP_KEY, path, "text model", why)
    if not isinstance(eos, int):
        raise refusal(CLIP_KEY, path, "text model", f"its eos_token_id is {eos!r}, not a number")
    return config


def _clip_shapes(config: Any) -> Shapes:
    width, hidden = config.hidden_size, config.intermediate_size
    shapes: Shapes = {
        "embeddings.token_embedding.weight": (config.vocab_size, width),
        "embeddings.position_embedding.weight": (config.max_position_embeddings, width),
    }
    layers = {f"self_attn.{one}_proj": (width, width) for one in ("q", "k", "v", "out")}
    layers |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    norms = [
        f"encoder.layers.{i}.layer_norm{j}" for i in range(config.num_hidden_layers) for j in (1, 2)
    ]
    for norm in (*norms, "final_layer_norm"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for i in range(config.num_hidden_layers):
        for layer, shape in layers.items():
            name = f"encoder.layers.{i}.{layer}"
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


_KINDS = {
    T5_KEY: _Kind(
        read_t5_config,
        _t5_shapes,
        lambda name: re.sub(r"^encoder\.embed_tokens\.", _EMBEDDING, name),
        re.compile(r"decoder\.|lm_head\.|spiece_model$"),
    ),
    CLIP_KEY: _Kind(
        _clip_config,
        _clip_shapes,
        lambda name: name.removeprefix("text_model."),
        re.compile(
            r"(vision_model|visual_projection|text_projection)\.|logit_scale$"
            r"|(text_model\.)?embeddings\.position_ids$"
        ),
    ),
}
