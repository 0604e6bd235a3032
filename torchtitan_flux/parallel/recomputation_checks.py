"""Sections [activation_checkpoint] and [compile]: what is recomputed, and what is compiled."""

from collections.abc import Iterator

import torch

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.config.problems import Problem, violated

COMPILED = ("model", "loss")


def recomputation_problems(config: FluxJobConfig) -> Iterator[Problem]:
    """What cannot work in the sections [activation_checkpoint] and [compile]."""
    ac, compiling = config.activation_checkpoint, config.compile
    section, option, budget = "activation_checkpoint.", ac.selective_ac_option, "memory_budget"
    by_number = option.isdecimal() and int(option) > 0
    whole_blocks = ac.mode == "full" or (ac.mode == "selective" and by_number)
    unknown = ", ".join(name for name in compiling.components if name not in COMPILED)
    yield from violated(
        (
            ac.mode == "selective" and option != "op" and not by_number,
            section + "selective_ac_option",
            'must be "op", or a number N >= 1 in quotes to recompute every N-th block',
        ),
        (
            ac.mode == budget and not config.compiles("model"),
            section + "mode",
            'is a choice of the compiler: set compile.enable = true with "model" in '
            "compile.components, or use another mode",
            "compile.enable",
        ),
        (
            ac.mode == budget and config.parallelism.tensor_parallel_degree > 1,
            section + "mode",
            'the compiler cannot size the graphs of tensor parallelism; use mode = "selective", or '
            "set parallelism.tensor_parallel_degree = 1",
            "parallelism.tensor_parallel_degree",
        ),
        (
            ac.offload_inputs and not whole_blocks,
            section + "offload_inputs",
            'needs blocks that are recomputed as a whole: set activation_checkpoint.mode = "full", '
            'or "selective" with a number, or offload_inputs = false',
            section + "mode",
        ),
        (
            ac.determinism_check not in ("default", "none"),
            section + "determinism_check",
            'must be "default" or "none"',
        ),
        (
            ac.debug and ac.mode == "selective" and option == "op",
            section + "debug",
            'does not go with selective_ac_option = "op"; set one of them otherwise',
        ),
        (
            compiling.enable and unknown,
            "compile.components",
            f"{unknown} is unknown; known: {', '.join(COMPILED)}",
        ),
        (
            compiling.enable and compiling.backend not in torch.compiler.list_backends(()),
            "compile.backend",
            f"is not available; torch has {', '.join(torch.compiler.list_backends())}",
        ),
    )
