"""Two sets of weights, tensor by tensor and by what they compute."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torchtitan_flux.torchtitan_shim import CpuDevice

import torch
from torch import Tensor

from torchtitan_flux.latents import TokenGrid, image_ids, text_ids
from torchtitan_flux.model import FluxModel
from torchtitan_flux.weights.convert import same_bits
from torchtitan_flux.weights.open import Weights

_BLOCK = re.compile(r"((?:double|single)_blocks\.\d+|[^.]+)")
_GRID, _TEXT = TokenGrid(4, 6), 8


@dataclass
class Difference:
    """How far the parameters of a block are apart.

    Attributes:
        block: what they belong to.
        tensors: how many were compared.
        unequal: how many are not bit-equal, element types included.
        largest: largest absolute difference.
        squared, reference: sums over elements of the squared difference and of the squared value
            of the first.
    """

    block: str
    tensors: int = 0
    unequal: int = 0
    largest: float = 0.0
    squared: float = 0.0
    reference: float = 0.0

    @property
    def relative(self) -> float:
        """L2 norm of the difference over that of the first; 0 where both are zero."""
        if self.squared == 0:
            return 0.0
        return (self.squared / self.reference) ** 0.5 if self.reference else float("inf")


def differences(a: Weights, b: Weights) -> Iterator[Difference]:
    """Blocks with parameters that both have, in order; one parameter of each in memory."""
    now: Difference | None = None
    for name in a.shapes:
        if a.shapes[name] != b.shapes.get(name):
            continue
        found = _BLOCK.match(name)
        assert found is not None
        if now is None or now.block != found[1]:
            if now is not None:
                yield now
            now = Difference(found[1])
        _add(now, a.read(name), b.read(name))
    if now is not None:
        yield now


def _add(total: Difference, first: Tensor, second: Tensor) -> None:
    total.tensors += 1
    same = first.dtype == second.dtype and same_bits(first, second)
    total.unequal += not same
    # a million elements at a time: float64 copies of a whole tensor would be four times its size
    pairs = zip(first.flatten().split(2**20), second.flatten().split(2**20), strict=True)
    for one, other in pairs:
        one = one.double()
        total.reference += float(one.square().sum())
        if not same:
            apart = (one - other.double()).abs()
            # Python's max() would lose a NaN
            total.largest = float(torch.maximum(apart.max(), apart.new_tensor(total.largest)))
            total.squared += float(apart.square().sum())


def shape_lines(a: Weights, b: Weights) -> list[str]:
    """What keeps the two from being compared as a whole: keys, shapes, element types, arguments."""
    lines = []
    for first, second in ((a, b), (b, a)):
        only = [name for name in first.shapes if name not in second.shapes]
        lines += [f"only in {first.path}: {name} {first.shapes[name]}" for name in only]
    both = [name for name in a.shapes if name in b.shapes]
    lines += [
        f"{name}: {a.shapes[name]} and {b.shapes[name]}"
        for name in both
        if a.shapes[name] != b.shapes[name]
    ]
    kinds: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for name in both:
        pair = (a.dtypes[name], b.dtypes[name])
        kinds[pair] = kinds.get(pair, 0) + (pair[0] != pair[1])
    lines += [f"{n} tensors are {x} and {y}" for (x, y), n in kinds.items() if n]
    if a.args.axes_dim != b.args.axes_dim:
        lines.append(f"rotary axes: {a.args.axes_dim} and {b.args.axes_dim}")
    return lines


def forward_difference(a: Weights, b: Weights, seed: int = 0) -> float | str:
    """Relative L2 difference of both models' outputs for the same random input, in float32.

    One model at a time is in memory. A model without guidance is not given any.

    Returns:
        the difference, or why there is none.
    """
    names = ("in_channels", "out_channels", "vec_in_dim", "context_in_dim")
    if any(getattr(a.args, name) != getattr(b.args, name) for name in names):
        return "not run: their inputs or outputs differ in width"
    size = max(sum(4 * torch.Size(s).numel() for s in one.shapes.values()) for one in (a, b))
    if size > CpuDevice().get_device_properties().total_memory / 2:  # a container's limit counts
        return f"not run: {size / 1e9:.1f} GB in float32 is over half of the memory there is"
    first, second = (_forward(one, seed) for one in (a, b))
    return float((first - second).norm() / first.norm())


@torch.no_grad()
def _forward(weights: Weights, seed: int) -> Tensor:
    args = weights.args
    with torch.device("meta"):
        model = FluxModel(args)
    values = {name: weights.read(name, dtype=torch.float32) for name in weights.shapes}
    model.load_state_dict(values, assign=True)
    rng = torch.Generator().manual_seed(seed)
    guidance = torch.tensor([3.5]) if args.guidance_embed else None
    return model(
        img=torch.randn(1, _GRID.tokens, args.in_channels, generator=rng),
        img_ids=image_ids(_GRID, 1),
        txt=torch.randn(1, _TEXT, args.context_in_dim, generator=rng),
        txt_ids=text_ids(_TEXT, 1),
        timesteps=torch.tensor([0.5]),
        y=torch.randn(1, args.vec_in_dim, generator=rng),
        guidance=guidance,
    )


def describe(weights: Weights) -> str:
    """One line about a set of weights."""
    count = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    kinds = sorted({str(dtype).removeprefix("torch.") for dtype in weights.dtypes.values()})
    return (
        f"{Path(weights.path)}: {weights.format}, {len(weights.shapes)} tensors of ours, "
        f"{count:,} parameters, {', '.join(kinds)}"
    )
