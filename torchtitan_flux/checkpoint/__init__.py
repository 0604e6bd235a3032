"""Checkpoints and key maps. The four maps serve the transformer and the autoencoder alike:
which one is meant follows from the arguments (FluxModelArgs or AutoencoderArgs)."""

from collections.abc import Mapping

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


def from_bfl(state_dict: Mapping[str, Tensor], args: Args) -> StateDict:
    """Black Forest Labs' layout -> ours. Raises KeyMismatch naming every key that does not fit."""
    if isinstance(args, FluxModelArgs):
        return transformer.from_bfl(state_dict, args)
    return autoencoder.from_bfl(state_dict, args)


def to_bfl(state_dict: Mapping[str, Tensor], args: Args) -> StateDict:
    """Our layout -> Black Forest Labs'. Raises KeyMismatch naming every key that does not fit."""
    if isinstance(args, FluxModelArgs):
        return transformer.to_bfl(state_dict, args)
    return autoencoder.to_bfl(state_dict, args)


def from_diffusers(state_dict: Mapping[str, Tensor], args: Args) -> StateDict:
    """diffusers' layout -> ours. Raises KeyMismatch naming every key that does not fit."""
    if isinstance(args, FluxModelArgs):
        return transformer.from_diffusers(state_dict, args)
    return autoencoder.from_diffusers(state_dict, args)


def to_diffusers(state_dict: Mapping[str, Tensor], args: Args) -> StateDict:
    """Our layout -> diffusers'. Raises KeyMismatch naming every key that does not fit."""
    if isinstance(args, FluxModelArgs):
        return transformer.to_diffusers(state_dict, args)
    return autoencoder.to_diffusers(state_dict, args)
