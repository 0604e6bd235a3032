"""The frozen text encoders, T5 and CLIP, loaded through transformers."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from torchtitan_flux.encoders.pretrained import CLIP_KEY, T5_KEY
from torchtitan_flux.encoders.text_weights import TextWeights
from torchtitan_flux.encoders.tokenizer import CLIP_LENGTH, CaptionTokenizer

__all__ = ["CLIP_LENGTH", "CaptionTokenizer", "ClipEncoder", "T5Encoder"]

_LEGACY_EOS = 2


class T5Encoder(nn.Module):
    """T5's encoder. Padding attends like any token, as in BFL's and diffusers' FLUX.1."""

    def __init__(
        self,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load the weights (safetensors only), frozen and in eval mode.

        Args:
            path: local folder or hub name, `encoder.t5_encoder`.
            device: where the weights go.
            dtype: of the weights, the computation and the output.

        Raises:
            FileNotFoundError, ValueError: what is there is not exactly a T5, naming the TOML key.
        """
        from transformers import T5EncoderModel  # a second, which a run with encodings saves

        super().__init__()
        weights = TextWeights(T5_KEY, path)
        self.width: int = weights.config.d_model
        self.model = _load(T5EncoderModel, weights, device, dtype)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, tokens: Int64[Tensor, "b tokens"]) -> Float[Tensor, "b tokens width"]:
        """One feature vector per token, padding included."""
        return self.model(input_ids=tokens).last_hidden_state

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in their order, the units to shard."""
        return list(self.model.encoder.block)


class ClipEncoder(nn.Module):
    """CLIP's text model, of which FLUX.1 uses one pooled vector per caption."""

    def __init__(
        self,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load the weights (safetensors only), frozen and in eval mode.

        Args:
            path: local folder or hub name, `encoder.clip_encoder`; a whole CLIP serves too.
            device: where the weights go.
            dtype: of the weights, the computation and the output.

        Raises:
            FileNotFoundError, ValueError: what is there is not exactly a CLIP text model reading
                77 tokens, naming the TOML key.
        """
        from transformers import CLIPTextModel

        super().__init__()
        weights = TextWeights(CLIP_KEY, path)
        config = weights.config
        self.width: int = config.hidden_size
        # OpenAI's own configurations name end-of-text 2, which is not what their tokenizer writes:
        # there it is the highest id, 49407. transformers makes the same exception.
        eos = config.eos_token_id
        self.eos_token_id: int = config.vocab_size - 1 if eos == _LEGACY_EOS else eos
        self.model = _load(CLIPTextModel, weights, device, dtype)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, tokens: Int64[Tensor, "b 77"]) -> Float[Tensor, "b width"]:
        """The final layer norm's output at the first end-of-text token; no projection.

        Every row must hold that token, as `CaptionTokenizer` sees to.
        """
        states = self.model(input_ids=tokens).last_hidden_state
        end = (tokens == self.eos_token_id).int().argmax(dim=-1)
        return states[torch.arange(len(states), device=states.device), end]


def _load(kind: Any, weights: TextWeights, device: torch.device | str, dtype: torch.dtype) -> Any:
    """transformers' model with these weights, which have been found to be all of them."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # one bar for each encoder and rank
    with torch.device("meta"):
        names = list(kind._from_config(weights.config).state_dict())
    values = {name: weights.read(name, dtype) for name in weights.shapes}
    state = {name: values[weights.own_name(name)] for name in names}
    model = kind.from_pretrained(None, config=weights.config, state_dict=state, dtype=dtype)
    return model.to(device)
