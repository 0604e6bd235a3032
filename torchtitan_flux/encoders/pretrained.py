"""Finding a transformers model: a local folder or a name on the Hugging Face hub.

Which encoder a path stands for comes from the argument it was given for, never from its spelling;
what the folder says about itself (`model_type` in config.json) is compared with that.
"""

from pathlib import Path
from typing import Any

from torchtitan_flux.paths import is_hub_name
from torchtitan_flux.tensor_files.quantized import check_config
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.tensor_files.state_dict_keys import KeyMismatch

T5_KEY = "encoder.t5_encoder"
CLIP_KEY = "encoder.clip_encoder"

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json")
"""A tokenizer has one of these."""

PUBLISHED = {T5_KEY: ("text_encoder_2", "tokenizer_2"), CLIP_KEY: ("text_encoder", "tokenizer")}
"""Folders of a FLUX.1 repository or pipeline: the encoder, and its tokenizer beside it."""

# What transformers raises goes on for a screen; ours is one line, and all of it counts.
_REASON_LENGTH = 300
_OWN = (KeyMismatch, UnreadableWeights)


def locate(path: str | Path, key: str) -> dict[str, Any]:
    """Keyword arguments that make `from_pretrained` read `path`, without the network if a folder.

    Raises FileNotFoundError where there is no such folder, nor can it be a name on the hub.
    """
    if Path(path).is_dir():
        return {"pretrained_model_name_or_path": str(path), "local_files_only": True}
    if Path(path).exists() or not is_hub_name(str(path)):
        raise FileNotFoundError(
            f"{key}: there is no folder {path} (a name on the Hugging Face hub would be owner/name)"
        )
    return {"pretrained_model_name_or_path": str(path)}


def refusal(key: str, path: str | Path, what: str, error: Exception | str) -> ValueError:
    """The one error for a thing that does not load; for a name on the hub, also the way around.

    Not every repository can be reached, and some (google/t5-v1_1-xxl) have only pickles.
    """
    reason = " ".join(str(error).split()).rstrip(".")
    if len(reason) > _REASON_LENGTH and not isinstance(error, _OWN):
        reason = reason[:_REASON_LENGTH] + " …"
    message = f"{key}: cannot load the {what} from {path}: {reason}"
    if not Path(path).exists() and key in PUBLISHED:
        encoder, tokenizer = PUBLISHED[key]
        message += (
            "; FLUX.1's own is downloaded by `python scripts/download_hf_assets.py --repo_id "
            f"black-forest-labs/FLUX.1-schnell --assets {encoder} {tokenizer}`, then {key} = "
            f"'assets/hf/FLUX.1-schnell/{encoder}'"
        )
    return ValueError(message)


def read_t5_config(path: str | Path) -> Any:
    """Configuration of the T5 at `path`; FileNotFoundError or ValueError naming the TOML key."""
    from transformers import T5Config

    return T5Config.from_dict(_read_config(path, T5_KEY, "t5"))


def read_clip_config(path: str | Path) -> Any:
    """The same of CLIP's text model, also out of a whole CLIP's."""
    from transformers import CLIPTextConfig

    config = _read_config(path, CLIP_KEY, "clip_text_model", "clip")
    return CLIPTextConfig.from_dict(config.get("text_config") or config)


def text_widths(t5_path: str | Path, clip_path: str | Path) -> tuple[int, int]:
    """(features per T5 token, of CLIP's vector), from config.json alone; raises as those above."""
    return read_t5_config(t5_path).d_model, read_clip_config(clip_path).hidden_size


def _read_config(path: str | Path, key: str, *model_types: str) -> dict[str, Any]:
    where = locate(path, key)
    try:
        from transformers import PretrainedConfig

        config, _ = PretrainedConfig.get_config_dict(**where)
        found = config.get("model_type")
        if found not in model_types:
            needed = " or ".join(map(repr, model_types))
            raise ValueError(f"its model_type is {found!r}, needed is {needed}")
        check_config(config)
    except (OSError, ValueError) as error:
        raise refusal(key, path, "configuration", error) from None
    return config


def load_tokenizer(path: str | Path, key: str) -> Any:
    """The tokenizer in a folder or repository, else in the folder beside it of a pipeline."""
    where = locate(path, key)
    beside = Path(path).parent / PUBLISHED[key][1]
    if Path(path).is_dir() and not has_tokenizer(Path(path)) and has_tokenizer(beside):
        where = locate(beside, key)
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(**where, use_fast=True)
    # transformers, tokenizers (plain Exception) and missing sentencepiece each raise their own kind
    except Exception as error:
        raise refusal(key, path, "tokenizer", error) from None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)
