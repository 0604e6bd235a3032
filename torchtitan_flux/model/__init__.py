"""The FLUX.1 transformer as a library: no trainer, no mesh, no I/O."""

from torchtitan_flux.model.args import FIXED_WIDTH_FLAVORS, FLAVORS, FluxModelArgs
from torchtitan_flux.model.flops import flops_per_image
from torchtitan_flux.model.model import FluxModel

__all__ = ["FIXED_WIDTH_FLAVORS", "FLAVORS", "FluxModel", "FluxModelArgs", "flops_per_image"]
