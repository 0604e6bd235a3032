"""What weights are that are no whole FLUX.1 transformer, by the names of their tensors."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_GIVE_MODEL = "give the transformer, as flux1-dev.safetensors or the folder transformer"
_OTHER_MODEL = "another model than FLUX.1, which is not read here"
_MERGE = (
    "there is no LoRA here: merge it into the model that it was made for (diffusers: "
    "load_lora_weights, fuse_lora), and give the result"
)


@dataclass(frozen=True)
class _Kind:
    """One kind of weights.

    Attributes:
        names: what a tensor's name holds.
        what: how the message goes on after the path.
        beside: whether it is this even where a transformer's tensors are there as well.
    """

    names: re.Pattern[str]
    what: str
    beside: bool = False


def _kind(names: str, what: str, beside: bool = False) -> _Kind:
    return _Kind(re.compile(names), what, beside)


KINDS = (
    _kind(
        r"\.base_layer\.",
        f"is a model with a LoRA (adapter) that is not merged into it; {_MERGE}",
        beside=True,
    ),
    _kind(
        r"(^|\.)(controlnet_(?!$)|input_hint_block\.|pos_embed_input\.)",
        f"is a ControlNet, which steers a transformer and is none; {_GIVE_MODEL}",
        beside=True,
    ),
    _kind(
        r"(^|[._])ip_adapter[._]|^image_proj(_model)?\.|\.to_[kv]_ip\.",
        f"is an IP-Adapter, which steers a transformer and is none; {_GIVE_MODEL}",
        beside=True,
    ),
    _kind(r"(^|\.)distilled_guidance_layer\.", f"is Chroma, {_OTHER_MODEL}", beside=True),
    _kind(
        r"(^|\.)(double_stream_modulation_(img|txt)|single_stream_modulation)\.",
        f"is FLUX.2, {_OTHER_MODEL}",
        beside=True,
    ),
    # peft, diffusers, kohya, XLabs, LyCORIS (LoKr, LoHa, OFT, full differences), DoRA
    _kind(
        r"(^|[._])(lora|lokr|hada|oft|boft|ia3|dora|glora|lycoris)(_|\.|\d)|\.(diff|diff_b)$",
        f"is a LoRA (adapter), not whole weights; {_MERGE}",
    ),
    _kind(r"^redux_(up|down)\.", f"is FLUX.1 Redux, which makes text of pictures; {_GIVE_MODEL}"),
    _kind(
        r"layer\.\d+\.SelfAttention\.|(^|\.)enc\.blk\.\d+\.",
        f"is a T5 text encoder; {_GIVE_MODEL} (T5's folder goes to encoder.t5_encoder)",
    ),
    _kind(
        r"(^|\.)(text_model|vision_model)\.|(^|\.)transformer\.resblocks\.\d+\.",
        f"is a CLIP encoder; {_GIVE_MODEL} (CLIP's folder goes to encoder.clip_encoder)",
    ),
    _kind(
        r"(^|\.)(en|de)coder\.(conv_in|conv_out|layers\.\d+|mid|mid_block)\.(.*\.)?(weight|bias)$",
        f"is an autoencoder; {_GIVE_MODEL} (the autoencoder goes to encoder.autoencoder_path)",
    ),
    _kind(
        r"(^|\.)input_blocks\.\d+\.|(^|\.)down_blocks\.\d+\.(attentions|resnets)\.",
        f"is a U-Net, as of Stable Diffusion: {_OTHER_MODEL}",
    ),
    _kind(
        r"(^|\.)joint_blocks\.\d+\.|(^|\.)pos_embed\.proj\.",
        f"is Stable Diffusion 3 or a relative of it: {_OTHER_MODEL}",
    ),
    _kind(
        r"(^|\.)transformer_blocks\.\d+\.(img|txt)_mod\.",
        f"is Qwen-Image or a relative of it: {_OTHER_MODEL}",
        beside=True,
    ),
    _kind(
        r"(^|\.)(model\.)?layers\.\d+\.(self_attn|attention|feed_forward|mlp)\.",
        f"is a language model or a relative of it: {_OTHER_MODEL}",
    ),
    _kind(
        r"(^|\.)exp_avg(_sq)?(\.|$)|^optim(izer)?\.",
        f"is the state of an optimizer, and no weights; {_GIVE_MODEL}",
    ),
)

CLASSES = {
    "FluxControlNetModel": "a ControlNet",
    "AutoencoderKL": "an autoencoder",
    "AutoencoderTiny": "an autoencoder of another kind",
    "T5EncoderModel": "a T5 text encoder",
    "CLIPTextModel": "a CLIP text encoder",
    "UNet2DConditionModel": "a U-Net, as of Stable Diffusion",
    "ChromaTransformer2DModel": "Chroma",
    "Flux2Transformer2DModel": "FLUX.2",
}
"""What a `config.json` describes, by its class."""


def kind_of(names: Iterable[str], transformer: bool) -> str | None:
    """What weights are that are no whole FLUX.1 transformer, as "is …; what to do".

    Args:
        names: of all tensors.
        transformer: whether they hold the input layer of one.

    Returns:
        None where they are not known to be anything else.
    """
    names = list(names)
    for kind in KINDS:
        if (kind.beside or not transformer) and any(map(kind.names.search, names)):
            return kind.what
    return None
