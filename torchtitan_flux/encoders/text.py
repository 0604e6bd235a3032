"""The frozen text encoders, T5 and CLIP, loaded through transformers."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from torchtitan_flux.encoders.pretrained import (
    CLIP_KEY,
    T5_KEY,
    locate,
    read_clip_config,
    read_t5_config,
    refusal,
)
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
            FileNotFoundError, ValueError: what is there is not a complete T5, naming the TOML key.
        """
        super().__init__()
        config = read_t5_config(path)
        self.width: int = config.d_model
        self.model = _load(T5EncoderModel, config, path, T5_KEY, device, dtype)
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
            FileNotFoundError, ValueError: what is there is not a complete CLIP text model reading
                77 tokens, naming the TOML key.
        """
        super().__init__()
        config = read_clip_config(path)
        if config.max_position_embeddings < CLIP_LENGTH:
            raise refusal(
                CLIP_KEY,
                path,
                "text model",
                f"it reads {config.max_position_embeddings} tokens, needed are {CLIP_LENGTH}",
            )
        self.width: int = config.hidden_size
        # OpenAI's own configurations name end-of-text 2, which is not what their tokenizer writes:
        # there it is the highest id, 49407. transformers makes the same exception.
        eos = config.eos_token_id
        if not isinstance(eos, int):
            raise refusal(
                CLIP_KEY, path, "text model", f"its eos_token_id is {eos!r}, not a number"
            )
        self.eos_token_id: int = config.vocab_size - 1 if eos == _LEGACY_EOS else eos
        self.model = _load(CLIPTextModel, config, path, CLIP_KEY, device, dtype)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, tokens: Int64[Tensor, "b 77"]) -> Float[Tensor, "b width"]:
        """The final layer norm's output at the first end-of-text token; no projection.

        Every row must hold that token, as `CaptionTokenizer` sees to.
        """
        states = self.model(input_ids=tokens).last_hidden_state
        end = (tokens == self.eos_token_id).int().argmax(dim=-1)
        return states[torch.arange(len(states), device=states.device), end]


def _load(
    kind: Any,
    config: Any,
    path: str | Path,
    key: str,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Any:
    """`kind.from_pretrained`, refusing weights that are missing: they would be random."""
    try:
        model, info = kind.from_pretrained(
            **locate(path, key),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise refusal(key, path, "weights", error) from None
    if info["missing_keys"]:
        raise refusal(key, path, "weights", f"missing: {', '.join(sorted(info['missing_keys']))}")
    return model.to(device)
