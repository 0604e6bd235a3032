"""Finding a transformers model: a local folder or a name on the Hugging Face hub.

Which encoder a path stands for comes from the argument it was given for, never from its spelling;
what the folder says about itself (`model_type` in config.json) is compared with that.
"""

from pathlib import Path
from typing import Any

from torchtitan_flux.paths import absence, looks_local
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
    if Path(path).exists():
        raise FileNotFoundError(f"{key}: {path} is a file; name the folder with its config.json")
    if looks_local(str(path)):
        raise FileNotFoundError(f"{key}: {path} {absence(path)}")
    return {"pretrained_model_name_or_path": str(path)}


def refusal(key: str, path: str | Path, what: str, error: Exception | str) -> ValueError:
    """The one error for a thing that does not load."""
    reason = " ".join(str(error).split()).rstrip(".")
    if len(reason) > _REASON_LENGTH and not isinstance(error, _OWN):
        reason = reason[:_REASON_LENGTH] + " …"
    hint = "" if Path(path).exists() else "; docs/downloads.md tells how to get FLUX.1's own"
    return ValueError(f"{key}: cannot load the {what} from {path}: {reason}{hint}")


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
    try:
        if Path(path).is_dir():
            where = locate(tokenizer_folder(Path(path), key), key)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(**where, use_fast=True)
    # transformers, tokenizers (plain Exception) and missing sentencepiece each raise their own kind
    except Exception as error:
        raise refusal(key, path, "tokenizer", error) from None


def tokenizer_folder(encoder: Path, key: str) -> Path:
    """The folder of an encoder, or that beside it, whichever holds a tokenizer."""
    places = [encoder, encoder.parent / PUBLISHED[key][1]]
    for place in places:
        if any((place / name).is_file() for name in TOKENIZER_FILES):
            return place
    raise FileNotFoundError(
        f"no tokenizer ({' or '.join(TOKENIZER_FILES)}) is in {places[0]} or {places[1]}"
    )
