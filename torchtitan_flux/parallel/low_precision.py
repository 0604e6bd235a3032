"""torchtitan's converters to float8 and MXFP8, as FLUX needs them.

Importing this module puts them in the place of torchtitan's, under the same names. Which layers are
converted, and why: parallel/low_precision_checks.py. Parameters keep their names, shapes and
float32 values; only the products are computed in 8 bits (and, where asked for, weights are
gathered in them).
"""

import copy
from dataclasses import replace
from typing import Any

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torch import nn
from torchtitan.components.quantization.float8 import Float8LinearConverter
from torchtitan.components.quantization.mx import MXLinearConverter
from torchtitan.protocols import model_converter

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.model.args import EMBEDDERS
from torchtitan_flux.parallel.low_precision_checks import FLOAT8, MX
from torchtitan_flux.shards import laid_out_as, local


class FluxFloat8Converter(Float8LinearConverter):
    """torchtitan's, which drops `emulate` where a recipe is named."""

    def __init__(self, job_config: FluxJobConfig, parallel_dims: Any):
        super().__init__(_embedders_kept(job_config), parallel_dims)
        self.config = replace(self.config, emulate=job_config.quantize.linear.float8.emulate)

    def convert(self, model: nn.Module) -> None:
        super().convert(model)
        if self.config.enable_fsdp_float8_all_gather:
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.register_state_dict_post_hook(_plain_weight)


class FluxMXConverter(MXLinearConverter):
    """torchtitan's, without the embedders."""

    def __init__(self, job_config: FluxJobConfig, parallel_dims: Any):
        super().__init__(_embedders_kept(job_config), parallel_dims)


def _embedders_kept(job_config: FluxJobConfig) -> FluxJobConfig:
    """The configuration with the embedders in both lists of what is not converted.

    A copy: torchtitan also takes its "auto_filter_small_kn" out of the list it is given.
    """
    job_config = copy.deepcopy(job_config)
    for section in (job_config.quantize.linear.float8, job_config.quantize.linear.mx):
        section.filter_fqns = [*section.filter_fqns, *EMBEDDERS]
    return job_config


def _plain_weight(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Show the weight in a state dict without torchao's wrapper, in the same memory.

    FSDP's float8 all-gather hangs on a tensor subclass, which a checkpoint would pickle: it could
    then be read only where torchao is installed.
    """
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    name = f"{prefix}weight"
    if isinstance(shard := local(state[name]), WeightWithDynamicFloat8CastTensor):
        state[name] = laid_out_as(state[name], shard._tensor)


# register_model_converter refuses a name that is taken
model_converter._registry_model_converter_cls.update(
    {FLOAT8: FluxFloat8Converter, MX: FluxMXConverter}
)
