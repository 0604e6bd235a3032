"""What a file holds, by the names of its tensors: for messages about files of another kind."""

import re
from collections.abc import Iterable

TRANSFORMER = "a FLUX transformer"
_KINDS = {
    "a LoRA (adapter)": r"(^|[._])(lora|lokr|hada|oft|boft|ia3|dora|glora|lycoris)(_|\.|\d)"
    r"|\.(diff|diff_b)$",
    TRANSFORMER: r"(^|\.)((double|single)_blocks|(single_)?transformer_blocks)\.\d+\.",
    "a T5 text encoder": r"layer\.\d+\.SelfAttention\.|(^|\.)enc\.blk\.\d+\.",
    "a CLIP encoder": r"(^|\.)(text_model|vision_model)\.|(^|\.)transformer\.resblocks\.\d+\.",
    "an autoencoder": r"(^|\.)(en|de)coder\.(conv_in|conv_out|layers\.\d+|mid|mid_block)\.",
}


def kind_of(names: Iterable[str]) -> str:
    """What weights with these names are; empty where that is not known."""
    names = list(names)
    for kind, pattern in _KINDS.items():
        if any(re.search(pattern, name) for name in names):
            return kind
    return ""
