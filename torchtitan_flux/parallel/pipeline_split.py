"""Where a model is cut into pipeline stages: so that the slowest stage is as fast as can be."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

from torchtitan.config import Parallelism

from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.model.flops import flops_of_parts
from torchtitan_flux.parallel.pipeline_plan import check_parts, module_names, stage_count

Number = int | float  # exact while finite


def split_model(
    parallelism: Parallelism, args: FluxModelArgs, size: ImageSize, text_tokens: int
) -> list[list[str]]:
    """Names of the modules of each stage: as the user named them, or balanced by operations.

    A double block has twice the weights of a single one and costs the same: a token meets one half
    of them. FLUX.1's embedders cost 0.05 blocks at 256 pixels, less above; its final layer 0.001.

    Args:
        parallelism: section [parallelism].
        args: the model.
        size: of the images, in pixels.
        text_tokens: length of the text sequence.

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
    """Cut a sequence into parts, none empty, so that the dearest part is as cheap as possible.

    Among such cuts, the one whose parts are most alike (least sum of squares).

    Args:
        costs: of each element.
        parts: how many; at most as many as there are elements.

    Returns:
        where each part ends, the last at len(costs).
    """
    dearest, _ = _cut(costs, parts, max)

    def squares(before: Number, part: int) -> Number:
        return before + part * part if part <= dearest else math.inf

    _, ends = _cut(costs, parts, squares)
    return ends


def _cut(
    costs: Sequence[int], parts: int, join: Callable[[Number, int], Number]
) -> tuple[Number, list[int]]:
    """Dynamic programming: the least that `join`, from part to part, can make, and the ends."""
    count = len(costs)
    total = [0, *accumulate(costs)]
    # best[n][i]: the least for n parts of the first i elements; begins[n][i]: of the n-th of them
    best: list[list[Number]] = [[0, *[math.inf] * count]]
    begins: list[list[int]] = [[0] * (count + 1)]
    for n in range(1, parts + 1):
        best.append([math.inf] * (count + 1))
        begins.append([0] * (count + 1))
        for i in range(n, count + 1):
            best[n][i], begins[n][i] = min(
                (join(best[n - 1][j], total[i] - total[j]), j) for j in range(n - 1, i)
            )
    ends = [count]
    for n in range(parts, 1, -1):
        ends.insert(0, begins[n][ends[0]])
    return best[parts][count], ends
