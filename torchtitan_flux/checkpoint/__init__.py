"""Checkpoints and key maps. The four maps serve the transformer and the autoencoder alike:
which one is meant follows from the arguments (FluxModelArgs or AutoencoderArgs)."""

from collections.abc import Mapping
from types import ModuleType

from torch import Tensor

from torchtitan_flux.checkpoint import autoencoder, transformer
from torchtitan_flux.encoders.autoencoder import AutoencoderArgs
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.state_dict_keys import KeyMismatch

__all__ = [
    "KeyMismatch",
    "autoencoder",
    "from_bfl",
    "from_diffusers",
    "to_bfl",
    "to_diffusers",
    "transformer",
]

StateDict = dict[str, Tensor]
Args = FluxModelArgs | AutoencoderArgs


def _maps(args: Args) -> ModuleType:
    return transformer if isinstance(args, FluxModelArgs) else autoencoder


def from_bfl(state_dict: Mapping[str, Tensor], args: Args) -> StateDict:
    """Black Forest Labs' layout -> ours. Raises KeyMismatch naming every key that does not fit."""
    return _maps(args).from_bfl(state_dict, args)


def to_bfl(state_dict: Mapping[str, Tensor], args: Args) -> StateDict:
    """Our layout -> Black Forest Labs'. Raises KeyMismatch naming every key that does not fit."""
    return _maps(args).to_bfl(state_dict, args)


def from_diffusers(state_dict: Mapping[str, Tensor], args: Args) -> StateDict:
    """diffusers' layout -> ours. Raises KeyMismatch naming every key that does not fit."""
    return _maps(args).from_diffusers(state_dict, args)


def to_diffusers(state_dict: Mapping[str, Tensor], args: Args) -> StateDict:
    """Our layout -> diffusers'. Raises KeyMismatch naming every key that does not fit."""
    return _maps(args).to_diffusers(state_dict, args)
