"""Where a model is cut into pipeline stages: so that the slowest stage is as fast as can be."""

from collections.abc import Sequence
from itertools import accumulate

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.config import Parallelism

from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.model.flops import flops_of_parts
from torchtitan_flux.parallel.pipeline_plan import check_parts, module_names, stage_count

POWER = 256
"""Costs of parts are compared by the sum of this power: the largest alone decides."""


def split_model(
    parallelism: Parallelism, args: FluxModelArgs, size: ImageSize, text_tokens: int
) -> list[list[str]]:
    """Names of the modules of each stage: as the user named them, or balanced by operations.

    A double block has twice the weights of a single one and costs the same: a token meets one half
    of them. FLUX.1's embedders cost 0.05 blocks at 256 pixels, less above; its final layer 0.001.

    Raises:
        ValueError: naming the key that does not fit.
    """
    stages = stage_count(parallelism, args)
    if parts := parallelism.module_fqns_per_model_part:
        check_parts(parts, args)
        return parts
    names = module_names(args)
    blocks = [name for name in names if "_blocks." in name]
    flops = flops_of_parts(args, size, text_tokens)
    costs = [flops.double_block] * args.depth + [flops.single_block] * args.depth_single_blocks
    costs[0] += flops.embedders
    costs[-1] += flops.final_layer
    ends = balanced(costs, stages)
    split = [blocks[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    split[0] = [name for name in names if name.endswith("_in")] + split[0]
    split[-1] = [*split[-1], "final_layer"]
    return split


def balanced(costs: Sequence[int], parts: int) -> list[int]:
    """Cut a sequence into parts, none empty, so that the most expensive part is as cheap as can be,
    then the second, and so on.

    Args:
        costs: of each element.
        parts: how many; at most as many as there are elements.

    Returns:
        where each part ends, the last at len(costs).
    """
    total = [0, *accumulate(costs)]
    # by the first so many elements: the least cost of a cut, and where its parts end
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for _ in range(parts):
        best = {
            end: min(
                (cost + (total[end] - total[begin]) ** POWER, [*ends, end])
                for begin, (cost, ends) in best.items()
                if begin < end
            )
            for end in range(min(best) + 1, len(total))
        }
    return best[len(costs)][1]
