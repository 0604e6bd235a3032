"""The frozen text encoders, T5 and CLIP: transformers' models with weights from safetensors alone.

Every key of the weights is accounted for, by the header alone, before any value is read.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from jaxtyping import Float, Int64
from torch import Tensor, nn

from torchtitan_flux.encoders.pretrained import (
    CLIP_KEY,
    T5_KEY,
    locate,
    read_clip_config,
    read_t5_config,
    refusal,
)
from torchtitan_flux.encoders.tokenizer import CLIP_LENGTH
from torchtitan_flux.tensor_files import file_sets
from torchtitan_flux.tensor_files.quantized import ScaledSource
from torchtitan_flux.tensor_files.safetensors_file import TensorsFile
from torchtitan_flux.tensor_files.sources import FilesSource, RenamedSource, Source
from torchtitan_flux.tensor_files.state_dict_keys import check_keys, shapes_of

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
_EMBEDDING = "shared."
_LEGACY_EOS = 2


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
            folder = Path(locate(path, key)["pretrained_model_name_or_path"])
            if not folder.is_dir():
                plain = [SINGLE, INDEX, "model-*.safetensors"]
                folder = Path(snapshot_download(str(path), allow_patterns=plain))
            stored = FilesSource([TensorsFile.open(one) for one in files_in(folder)[0]])
            named = RenamedSource(stored, _own_names(stored, self._kind))
            self._source = ScaledSource(named, "it")
            check_keys(self._source.shapes, self.shapes, "it")
        except (OSError, ValueError) as error:
            raise refusal(key, path, "weights", error) from None
        self.scaled = bool(self._source.scales)

    def load(self, device: torch.device | str, dtype: torch.dtype) -> Any:
        """transformers' model with these weights, which have been found to be all of them.

        Raises ValueError where the file cannot be read, or `dtype` cannot hold a value.
        """
        import transformers

        transformers.utils.logging.disable_progress_bar()  # one bar for each encoder and rank
        try:
            values = {name: self._source.read(name, dtype) for name in self.shapes}
        except (OSError, ValueError) as error:
            raise refusal(self._key, self._path, "weights", error) from None
        state = {name: values[own] for name, own in self._theirs.items()}
        model = self._kind.model.from_pretrained(
            None, config=self.config, state_dict=state, dtype=dtype
        )
        return model.to(device)


def files_in(folder: Path) -> tuple[list[Path], Path | None]:
    """The weights of an encoder in a local folder, and their index where they have one.

    A variant, such as fp16, counts where the plain files are not there; one file before shards, as
    transformers has it. Shards need no index.

    Raises FileNotFoundError, ValueError: there are none, or several variants; a shard is missing.
    """
    there = file_sets.weight_files(folder)
    found = [one for one in there if f"{one.stem}.safetensors" == SINGLE]
    if len(found) != 1:
        names = ", ".join(one.shown for one in found or there) or "none"
        raise FileNotFoundError(
            f"{folder / SINGLE} does not exist, nor one variant or index of shards; safetensors "
            f"there: {names} (pickles, as pytorch_model.bin, are not read: they could run code)"
        )
    (files,) = found
    for name in files.names:
        if file_sets.shard_count(folder / name) == 1:
            return [folder / name], None
    return files.paths(), folder / files.index if files.index else None


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


def _own_names(stored: Source, kind: _Kind) -> dict[str, str]:
    """The encoder's tensors: the name used here -> the one in the file."""
    found: dict[str, str] = {}
    for name in sorted(stored.shapes):  # `shared`, the last of the embedding's two names, counts
        own = kind.renamed(name)
        if re.match(kind.others, name):
            continue
        if own in found and not own.startswith(_EMBEDDING):
            raise ValueError(f"{own} is there twice: {found[own]} and {name}")
        found[own] = name
    return found


def _clip_config(path: str | Path) -> Any:
    config = read_clip_config(path)
    tokens, eos = config.max_position_embeddings, config.eos_token_id
    if tokens < CLIP_LENGTH or not isinstance(eos, int):
        why = f"it reads {tokens} tokens, needed are {CLIP_LENGTH}, and ends them with {eos!r}"
        raise refusal(CLIP_KEY, path, "text model", why)
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


class _TextEncoder(nn.Module):
    """transformers' model, frozen and in eval mode."""

    key: str

    def __init__(
        self,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load the weights of a local folder or hub name; `dtype` is also that of the output.

        Raises FileNotFoundError or ValueError, naming the TOML key, unless all of it is there.
        """
        super().__init__()
        weights = TextWeights(self.key, path)
        self.config = weights.config
        self.width: int = self.config.hidden_size  # T5's d_model has this name, too
        self.model = weights.load(device, dtype)
        self.requires_grad_(False).eval()


class T5Encoder(_TextEncoder):
    """T5's encoder. Padding attends like any token, as in BFL's and diffusers' FLUX.1."""

    key = T5_KEY

    @torch.no_grad()
    def forward(self, tokens: Int64[Tensor, "b tokens"]) -> Float[Tensor, "b tokens width"]:
        """One feature vector per token, padding included."""
        return self.model(input_ids=tokens).last_hidden_state

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in their order, the units to shard."""
        return list(self.model.encoder.block)


class ClipEncoder(_TextEncoder):
    """CLIP's text model, of which FLUX.1 uses one pooled vector per caption."""

    key = CLIP_KEY

    @property
    def eos_token_id(self) -> int:
        """OpenAI's own configurations name end-of-text 2, which is not what their tokenizer writes.

        There it is the highest id, 49407. transformers makes the same exception.
        """
        eos = self.config.eos_token_id
        return self.config.vocab_size - 1 if eos == _LEGACY_EOS else eos

    @torch.no_grad()
    def forward(self, tokens: Int64[Tensor, "b 77"]) -> Float[Tensor, "b width"]:
        """The final layer norm's output at the first end-of-text token; no projection.

        Every row must hold that token, as `CaptionTokenizer` sees to.
        """
        states = self.model(input_ids=tokens).last_hidden_state
        end = (tokens == self.eos_token_id).int().argmax(dim=-1)
        return states[torch.arange(len(states), device=states.device), end]
