"""What weights are that were given as something else, by the names of their tensors."""

import re
from collections.abc import Iterable
from typing import NamedTuple

_GIVE = "give the transformer, as flux1-dev.safetensors or the folder transformer"
_OTHER = "another model than FLUX.1, which is not read here"
_STEERS = "which steers a transformer and is none"
_MERGE = (
    "there is no LoRA here: merge it into the model that it was made for (diffusers: "
    "load_lora_weights, fuse_lora), and give the result"
)


class Kind(NamedTuple):
    """One kind of weights.

    Attributes:
        names: pattern that a tensor's name holds.
        what: how a message goes on after the path.
        remedy: what to do where a transformer is wanted.
    """

    names: str
    what: str
    remedy: str = _GIVE


# Are these even where a transformer's tensors are there as well.
_BESIDE = (
    Kind(r"\.base_layer\.", "is a model with a LoRA (adapter) that is not merged", _MERGE),
    Kind(
        r"(^|\.)(controlnet_(?!$)|input_hint_block\.|pos_embed_input\.)",
        f"is a ControlNet, {_STEERS}",
    ),
    Kind(
        r"(^|[._])ip_adapter[._]|^image_proj(_model)?\.|\.to_[kv]_ip\.",
        f"is an IP-Adapter, {_STEERS}",
    ),
    Kind(r"(^|\.)distilled_guidance_layer\.", f"is Chroma, {_OTHER}"),
    Kind(r"(^|\.)(double|single)_stream_modulation(_\w+)?\.", f"is FLUX.2, {_OTHER}"),
    Kind(r"(^|\.)transformer_blocks\.\d+\.(img|txt)_mod\.", f"is Qwen-Image, {_OTHER}"),
)
_INSTEAD = (
    # peft, diffusers, kohya, XLabs, LyCORIS (LoKr, LoHa, OFT, full differences), DoRA
    Kind(
        r"(^|[._])(lora|lokr|hada|oft|boft|ia3|dora|glora|lycoris)(_|\.|\d)|\.(diff|diff_b)$",
        "is a LoRA (adapter), not whole weights",
        _MERGE,
    ),
    Kind(r"^redux_(up|down)\.", "is FLUX.1 Redux, which makes text of pictures"),
    Kind(
        r"(^|\.)input_blocks\.\d+\.|^(unet\.)?down_blocks\.\d+\.(attentions|resnets)\.",
        f"is a U-Net, as of Stable Diffusion: {_OTHER}",
    ),
    Kind(r"(^|\.)(joint_blocks\.\d+|pos_embed\.proj)\.", f"is Stable Diffusion 3, {_OTHER}"),
    Kind(
        r"layer\.\d+\.SelfAttention\.|(^|\.)enc\.blk\.\d+\.",
        "is a T5 text encoder",
        f"{_GIVE} (T5's folder goes to encoder.t5_encoder)",
    ),
    Kind(
        r"(^|\.)(text_model|vision_model)\.|(^|\.)transformer\.resblocks\.\d+\.",
        "is a CLIP encoder",
        f"{_GIVE} (CLIP's folder goes to encoder.clip_encoder)",
    ),
    Kind(
        r"(^|\.)(en|de)coder\.(conv_in|conv_out|layers\.\d+|mid|mid_block)\.(.*\.)?(weight|bias)$",
        "is an autoencoder",
        f"{_GIVE} (the autoencoder goes to encoder.autoencoder_path)",
    ),
    Kind(
        r"(^|\.)layers\.\d+\.(self_attn|attention|feed_forward|mlp)\.",
        f"is a language model, {_OTHER}",
    ),
    Kind(r"(^|\.)exp_avg(_sq)?(\.|$)|^optim(izer)?\.", "is the state of an optimizer, no weights"),
)

CLASSES = {
    "FluxControlNetModel": "a ControlNet",
    "AutoencoderKL": "an autoencoder",
    "T5EncoderModel": "a T5 text encoder",
    "CLIPTextModel": "a CLIP text encoder",
    "UNet2DConditionModel": "a U-Net, as of Stable Diffusion",
    "ChromaTransformer2DModel": "Chroma",
    "Flux2Transformer2DModel": "FLUX.2",
}
"""What a `config.json` describes, by its class."""


def kind_of(names: Iterable[str], transformer: bool) -> Kind | None:
    """What weights of these tensors are known to be that are no whole FLUX.1 transformer.

    `transformer`: whether they hold the input layer of one.
    """
    names = list(names)
    for kind in (*_BESIDE, *(() if transformer else _INSTEAD)):
        if any(re.search(kind.names, name) for name in names):
            return kind
    return None


def is_transformer(names: Iterable[str]) -> bool:
    """Whether there are blocks of a FLUX transformer, whole or not."""
    blocks = r"(^|\.)((double|single)_blocks|(single_)?transformer_blocks)\.\d+\."
    return any(re.search(blocks, name) for name in names)
