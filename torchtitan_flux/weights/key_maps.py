"""Key maps of the transformer: ours <-> BFL <-> diffusers <-> torchtitan 0.2.

Our names are BFL's, but for QK-norm (`.weight` for `.scale`) and the head-major fused weights
(`qkv_by_head`, `linear1_by_head`, `linear2_by_head`), which are permuted here and nowhere else.
Every missing, unknown or mis-shaped key is named and refused.

A map is a list of `Entry`: one of our parameters, the names it has elsewhere, and how values move
between the layouts. The same list is read in both directions, dict to dict here and part by part
in open.py.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from torchtitan_flux.model import FluxModel, FluxModelArgs
from torchtitan_flux.tensor_files.state_dict_keys import check_keys, shapes_of

StateDict = dict[str, Tensor]
Layout = Literal["ours", "bfl", "diffusers", "torchtitan"]

_KINDS = ("weight", "bias")


@dataclass(frozen=True)
class Entry:
    """One of our parameters and where its values are in a foreign layout.

    Attributes:
        ours: our name.
        theirs: foreign names; more than one where they keep apart what we fuse.
        join: foreign tensors, in the order of `theirs`, -> ours.
        split: our tensor -> foreign tensors.
        axis: the only dimension along which values change their places. `join` and `split` treat
            all places along the other one alike, so that they work as well on a part of it.
    """

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]
    axis: int = 0


def from_layout(layout: Layout, state: Mapping[str, Tensor], args: FluxModelArgs) -> StateDict:
    """A foreign layout -> ours. Raises KeyMismatch."""
    entries = layout_entries(layout, args)
    check_keys(shapes_of(state), foreign_shapes(args, entries), f"{layout} transformer state dict")
    return {
        entry.ours: entry.join([state[name] for name in entry.theirs]).contiguous()
        for entry in entries
    }


def to_layout(layout: Layout, state: Mapping[str, Tensor], args: FluxModelArgs) -> StateDict:
    """Ours -> a foreign layout. Raises KeyMismatch."""
    check_keys(shapes_of(state), our_shapes(args), "transformer state dict")
    return {
        name: tensor.contiguous()
        for entry in layout_entries(layout, args)
        for name, tensor in zip(entry.theirs, entry.split(state[entry.ours]), strict=True)
    }


@lru_cache(maxsize=8)
def our_shapes(args: FluxModelArgs) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in FluxModel(args).state_dict().items()}


def foreign_shapes(args: FluxModelArgs, entries: list[Entry]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the other layout, found by moving empty tensors through the map."""
    return {
        name: tuple(tensor.shape)
        for entry in entries
        for name, tensor in zip(
            entry.theirs,
            entry.split(torch.empty(our_shapes(args)[entry.ours], device="meta")),
            strict=True,
        )
    }


# ---- how values move -----------------------------------------------------------------------


def _same(ours: str, theirs: str) -> Entry:
    return Entry(ours, (theirs,), lambda tensors: tensors[0], lambda tensor: [tensor])


def _layer(ours: str, theirs: str) -> list[Entry]:
    return [_same(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in _KINDS]


def _rows_by_head(parts: list[Tensor], heads: int) -> Tensor:
    """Row blocks (part, head, row) -> rows (head, part, row); weights and biases."""
    cut = [part.unflatten(0, (heads, -1)) for part in parts]
    return torch.cat(cut, dim=1).flatten(0, 1)


def _rows_by_part(fused: Tensor, heads: int, sizes: list[int]) -> list[Tensor]:
    """The inverse of `_rows_by_head`; `sizes` are rows per head of each part."""
    return [part.flatten(0, 1) for part in fused.unflatten(0, (heads, -1)).split(sizes, dim=1)]


def _fused_rows(
    ours: str, theirs: tuple[str, ...], heads: int, sizes: list[int], fused_there: bool
) -> Entry:
    """Rows that we keep by head, and they keep by part, in one tensor or in several."""

    def join(tensors: list[Tensor]) -> Tensor:
        parts = list(tensors[0].split([heads * size for size in sizes])) if fused_there else tensors
        return _rows_by_head(parts, heads)

    def split(tensor: Tensor) -> list[Tensor]:
        parts = _rows_by_part(tensor, heads, sizes)
        return [torch.cat(parts)] if fused_there else parts

    return Entry(ours, theirs, join, split)


def _fused_columns(ours: str, theirs: str, heads: int, sizes: list[int]) -> Entry:
    """Columns that we keep by head, and they keep by part, in one tensor."""

    def join(tensors: list[Tensor]) -> Tensor:
        parts = list(tensors[0].T.split([heads * size for size in sizes]))
        return _rows_by_head(parts, heads).T

    def split(tensor: Tensor) -> list[Tensor]:
        return [torch.cat(_rows_by_part(tensor.T, heads, sizes)).T]

    return Entry(ours, (theirs,), join, split, axis=1)


def _swap_halves(ours: str, theirs: str) -> Entry:
    """(shift, scale) here, (scale, shift) there."""

    def swap(tensor: Tensor) -> Tensor:
        return rearrange(tensor, "(two h) ... -> two h ...", two=2).flip(0).flatten(0, 1)

    return Entry(ours, (theirs,), lambda tensors: swap(tensors[0]), lambda t: [swap(t)])


# ---- the maps ------------------------------------------------------------------------------


def layout_entries(layout: Layout, args: FluxModelArgs) -> list[Entry]:
    """The map between our parameters and those of a layout, in the order of ours or theirs."""
    if layout == "ours":
        return [_same(name, name) for name in our_shapes(args)]
    if layout == "diffusers":
        return _diffusers_entries(args)
    return _bfl_entries(args, norm="weight" if layout == "torchtitan" else "scale")


def _bfl_entries(args: FluxModelArgs, norm: str = "scale") -> list[Entry]:
    """In torchtitan 0.2's own FLUX, the weight of a norm has torch's name."""
    return [_bfl_entry(name, args, norm) for name in our_shapes(args)]


def _bfl_entry(name: str, args: FluxModelArgs, norm: str) -> Entry:
    heads, d = args.num_heads, args.head_dim
    m = args.mlp_hidden // heads
    theirs = name.replace("_by_head", "")
    if "qkv_by_head" in name:
        return _fused_rows(name, (theirs,), heads, [d, d, d], fused_there=True)
    if "linear1_by_head" in name:
        return _fused_rows(name, (theirs,), heads, [d, d, d, m], fused_there=True)
    if name.endswith("linear2_by_head.weight"):
        return _fused_columns(name, theirs, heads, [d, m])
    if name.endswith(("query_norm.weight", "key_norm.weight")):
        return _same(name, name.removesuffix("weight") + norm)
    return _same(name, theirs)


def _diffusers_entries(args: FluxModelArgs) -> list[Entry]:
    return [
        *_layer("img_in", "x_embedder"),
        *_layer("txt_in", "context_embedder"),
        *_layer("final_layer.linear", "proj_out"),
        *(
            _swap_halves(f"final_layer.adaLN_modulation.1.{kind}", f"norm_out.linear.{kind}")
            for kind in _KINDS
        ),
        *_diffusers_embedders(args),
        *(e for i in range(args.depth) for e in _diffusers_double(i, args)),
        *(e for i in range(args.depth_single_blocks) for e in _diffusers_single(i, args)),
    ]


def _diffusers_embedders(args: FluxModelArgs) -> Iterable[Entry]:
    pairs = [("time_in", "timestep_embedder"), ("vector_in", "text_embedder")]
    if args.guidance_embed:
        pairs.append(("guidance_in", "guidance_embedder"))
    for ours, theirs in pairs:
        yield from _layer(f"{ours}.in_layer", f"time_text_embed.{theirs}.linear_1")
        yield from _layer(f"{ours}.out_layer", f"time_text_embed.{theirs}.linear_2")


def _diffusers_double(i: int, args: FluxModelArgs) -> Iterable[Entry]:
    ours, theirs = f"double_blocks.{i}", f"transformer_blocks.{i}"
    d = args.head_dim
    for stream, norm, qkv, out, mlp, added in (
        ("img", "norm1", "to_{}", "to_out.0", "ff", ""),
        ("txt", "norm1_context", "add_{}_proj", "to_add_out", "ff_context", "added_"),
    ):
        yield from _layer(f"{ours}.{stream}_mod.lin", f"{theirs}.{norm}.linear")
        for kind in _KINDS if args.qkv_bias else _KINDS[:1]:
            names = tuple(f"{theirs}.attn.{qkv.format(part)}.{kind}" for part in "qkv")
            yield _fused_rows(
                f"{ours}.{stream}_attn.qkv_by_head.{kind}",
                names,
                args.num_heads,
                [d, d, d],
                fused_there=False,
            )
        yield from _layer(f"{ours}.{stream}_attn.proj", f"{theirs}.attn.{out}")
        for norm_ours, letter in (("query_norm", "q"), ("key_norm", "k")):
            yield _same(
                f"{ours}.{stream}_attn.norm.{norm_ours}.weight",
                f"{theirs}.attn.norm_{added}{letter}.weight",
            )
        yield from _layer(f"{ours}.{stream}_mlp.0", f"{theirs}.{mlp}.net.0.proj")
        yield from _layer(f"{ours}.{stream}_mlp.2", f"{theirs}.{mlp}.net.2")


def _diffusers_single(i: int, args: FluxModelArgs) -> Iterable[Entry]:
    ours, theirs = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
    heads, d = args.num_heads, args.head_dim
    m = args.mlp_hidden // heads
    yield from _layer(f"{ours}.modulation.lin", f"{theirs}.norm.linear")
    for kind in _KINDS:
        names = (
            *(f"{theirs}.attn.to_{part}.{kind}" for part in "qkv"),
            f"{theirs}.proj_mlp.{kind}",
        )
        yield _fused_rows(
            f"{ours}.linear1_by_head.{kind}", names, heads, [d, d, d, m], fused_there=False
        )
    yield _fused_columns(
        f"{ours}.linear2_by_head.weight", f"{theirs}.proj_out.weight", heads, [d, m]
    )
    yield _same(f"{ours}.linear2_by_head.bias", f"{theirs}.proj_out.bias")
    for norm_ours, letter in (("query_norm", "q"), ("key_norm", "k")):
        yield _same(f"{ours}.norm.{norm_ours}.weight", f"{theirs}.attn.norm_{letter}.weight")
