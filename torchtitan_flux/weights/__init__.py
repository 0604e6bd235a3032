"""Checkpoints and key maps. The four maps serve the transformer and the autoencoder alike:
which one is meant follows from the arguments (FluxModelArgs or AutoencoderArgs)."""

from collections.abc import Mapping
from types import ModuleType

from torch import Tensor

from torchtitan_flux.encoders.autoencoder import AutoencoderArgs
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.tensor_files.state_dict_keys import KeyMismatch
from torchtitan_flux.weights import autoencoder_maps, key_maps

__all__ = [
    "KeyMismatch",
    "autoencoder_maps",
    "from_bfl",
    "from_diffusers",
    "key_maps",
    "to_bfl",
    "to_diffusers",
]

StateDict = dict[str, Tensor]
Args = FluxModelArgs | AutoencoderArgs


def _maps(args: Args) -> ModuleType:
    return key_maps if isinstance(args, FluxModelArgs) else autoencoder_maps


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
