"""Sections [activation_checkpoint] and [compile]: what is recomputed, and what is compiled."""

import torch

from torchtitan_flux.config.job_config import FluxJobConfig

AC_MODES = ("none", "full", "selective", "memory_budget")
COMPILED = ("model", "loss")


def recomputation_problems(config: FluxJobConfig) -> list[str]:
    """What cannot work in the sections [activation_checkpoint] and [compile]."""
    found = []
    ac, compiling = config.activation_checkpoint, config.compile
    section = "activation_checkpoint"
    option = ac.selective_ac_option
    by_number = option.isdecimal() and int(option) > 0
    if ac.mode == "selective" and option != "op" and not by_number:
        found.append(
            f'{section}.selective_ac_option = {option!r}: use "op", or a number N >= 1 in quotes '
            "to recompute every N-th block"
        )
    if ac.mode == "memory_budget" and not config.compiles("model"):
        found.append(
            f'{section}.mode = "memory_budget" is a choice of the compiler: set compile.enable = '
            'true with "model" in compile.components, or use another mode'
        )
    if ac.mode == "memory_budget" and not 0 <= ac.memory_budget <= 1:
        found.append(f"{section}.memory_budget = {ac.memory_budget} is not in [0, 1]")
    if ac.mode == "memory_budget" and config.parallelism.tensor_parallel_degree > 1:
        found.append(
            f'{section}.mode = "memory_budget": the compiler cannot size the graphs of tensor '
            'parallelism; use mode = "selective", or set parallelism.tensor_parallel_degree = 1'
        )
    if ac.offload_inputs and not (ac.mode == "full" or (ac.mode == "selective" and by_number)):
        found.append(
            f"{section}.offload_inputs = true is about blocks that are recomputed as a whole: set "
            f'{section}.mode = "full", or "selective" with a number, or offload_inputs = false'
        )
    if ac.determinism_check not in ("default", "none"):
        found.append(
            f'{section}.determinism_check = {ac.determinism_check!r}: use "default" or "none"'
        )
    if ac.debug and ac.mode == "selective" and option == "op":
        found.append(
            f'{section}.debug = true does not go with selective_ac_option = "op"; set one of them '
            "otherwise"
        )
    if ac.visualize_memory_budget_pareto:
        found.append(
            f"{section}.visualize_memory_budget_pareto = true is not available; remove the key"
        )
    unknown = [name for name in compiling.components if name not in COMPILED]
    if compiling.enable and unknown:
        found.append(f"compile.components names {', '.join(unknown)}; known: {', '.join(COMPILED)}")
    if compiling.enable and compiling.backend not in torch.compiler.list_backends(()):
        found.append(
            f"compile.backend = {compiling.backend!r} is not available; torch has "
            f"{', '.join(torch.compiler.list_backends())}"
        )
    return found
