"""Finding a transformers model: a local folder or a name on the Hugging Face hub.

Which encoder a path stands for comes from the argument it was given for, never from its spelling;
what the folder says about itself (`model_type` in config.json) is compared with that.
"""

import re
from pathlib import Path
from typing import Any

from torchtitan_flux.tensor_files.quantized import QuantizedWeights, check_config
from torchtitan_flux.tensor_files.state_dict_keys import KeyMismatch

T5_KEY = "encoder.t5_encoder"
CLIP_KEY = "encoder.clip_encoder"

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json")
"""A tokenizer has one of these."""

PUBLISHED = {T5_KEY: ("text_encoder_2", "tokenizer_2"), CLIP_KEY: ("text_encoder", "tokenizer")}
"""Folders of FLUX.1's repositories: the encoder, and its tokenizer beside it."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# One line of the reason is enough, unless it is ours: what transformers raises goes on for a
# screen.
_REASON_LENGTH = 300
_OWN = (KeyMismatch, QuantizedWeights)


def locate(path: str | Path, key: str) -> dict[str, Any]:
    """Keyword arguments that make `from_pretrained` read `path`, without the network if a folder.

    Raises:
        FileNotFoundError: no such folder, and it cannot be a name on the hub either.
    """
    if Path(path).is_dir():
        return {"pretrained_model_name_or_path": str(path), "local_files_only": True}
    if Path(path).exists() or not _HUB_NAME.fullmatch(str(path)):
        raise FileNotFoundError(
            f"{key}: there is no folder {path} (a name on the Hugging Face hub would be owner/name)"
        )
    return {"pretrained_model_name_or_path": str(path)}


def refusal(key: str, path: str | Path, what: str, error: Exception | str) -> ValueError:
    """The one error for a thing that does not load: key, path, what, and the reason in short.

    For a name on the hub also the way around it: not every repository can be reached, and some
    (google/t5-v1_1-xxl) have their weights as a pickle alone, which could run code.
    """
    reason = " ".join(str(error).split()).rstrip(".")
    if len(reason) > _REASON_LENGTH and not isinstance(error, _OWN):
        reason = reason[:_REASON_LENGTH] + " …"
    said = f"{key}: cannot load the {what} from {path}: {reason}"
    if not Path(path).exists() and key in PUBLISHED:
        encoder, tokenizer = PUBLISHED[key]
        said += (
            "; FLUX.1's own is downloaded by `python scripts/download_hf_assets.py --repo_id "
            f"black-forest-labs/FLUX.1-schnell --assets {encoder} {tokenizer}`, then {key} = "
            f"'assets/hf/FLUX.1-schnell/{encoder}'"
        )
    return ValueError(said)


def read_t5_config(path: str | Path) -> Any:
    """Configuration of the T5 at `path`; FileNotFoundError or ValueError naming the TOML key."""
    from transformers import T5Config

    return T5Config.from_dict(_read_config(path, T5_KEY, ("t5",)))


def read_clip_config(path: str | Path) -> Any:
    """Configuration of CLIP's text model at `path`, also out of a whole CLIP's.

    Raises FileNotFoundError or ValueError naming the TOML key.
    """
    config = _read_config(path, CLIP_KEY, ("clip_text_model", "clip"))
    from transformers import CLIPTextConfig

    return CLIPTextConfig.from_dict(config.get("text_config") or config)


def text_widths(t5_path: str | Path, clip_path: str | Path) -> tuple[int, int]:
    """(T5 width, CLIP width): features per T5 token and of CLIP's vector, from config.json alone.

    Raises:
        FileNotFoundError, ValueError: naming the TOML key of the encoder that is not what it
            should be.
    """
    return read_t5_config(t5_path).d_model, read_clip_config(clip_path).hidden_size


def _read_config(path: str | Path, key: str, model_types: tuple[str, ...]) -> dict[str, Any]:
    where = locate(path, key)
    try:
        from transformers import PretrainedConfig

        config, _ = PretrainedConfig.get_config_dict(**where)
    except (OSError, ValueError) as error:
        raise refusal(key, path, "configuration", error) from None
    if config.get("model_type") not in model_types:
        needed = " or ".join(repr(name) for name in model_types)
        found = f"its model_type is {config.get('model_type')!r}, needed is {needed}"
        raise refusal(key, path, "configuration", found)
    try:
        check_config(config)
    except QuantizedWeights as error:
        raise refusal(key, path, "configuration", error) from None
    return config


def load_tokenizer(path: str | Path, key: str, diffusers_folder: str) -> Any:
    """The tokenizer at `path`, else in the folder beside it that diffusers pipelines use.

    Args:
        path: folder or hub name of the encoder.
        key: TOML key for the error message.
        diffusers_folder: where a FLUX.1 repository in diffusers layout keeps the tokenizer of this
            encoder: `tokenizer` beside `text_encoder`, `tokenizer_2` beside `text_encoder_2`.
    """
    where = locate(path, key)
    beside = Path(path).parent / diffusers_folder
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
