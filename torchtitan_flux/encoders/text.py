"""The frozen text encoders, T5 and CLIP, loaded through transformers."""

from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from torchtitan_flux.encoders.pretrained import CLIP_KEY, T5_KEY
from torchtitan_flux.encoders.text_weights import TextWeights
from torchtitan_flux.encoders.tokenizer import CLIP_LENGTH, CaptionTokenizer

__all__ = ["CLIP_LENGTH", "CaptionTokenizer", "ClipEncoder", "T5Encoder"]

_LEGACY_EOS = 2


class _TextEncoder(nn.Module):
    """transformers' model with weights from safetensors alone, frozen and in eval mode."""

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
