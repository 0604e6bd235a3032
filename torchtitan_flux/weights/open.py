"""Weights in any format, read part by part under our names.

| format | what is opened |
|---|---|
| diffusers | names of FluxTransformer2DModel: a folder, a pipeline's folder, or a file |
| bfl | Black Forest Labs' names, as in `flux1-*.safetensors` |
| comfyui | the same behind `model.diffusion_model.` |
| dcp | a checkpoint of ours, verified against its manifest |
| torchtitan | a checkpoint of torchtitan 0.2's own FLUX, read only |

Any other prefix of all names is cut off as well; what a path can be is found out in locations.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from torch import Tensor
from torchtitan.tools.logging import logger

from torchtitan_flux.formatting import listed
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.model.initial_values import initial_rows
from torchtitan_flux.shards import box as box_of
from torchtitan_flux.shards import local
from torchtitan_flux.tensor_files.element_types import BeyondRange, cast, narrows
from torchtitan_flux.tensor_files.quantized import ScaledSource
from torchtitan_flux.tensor_files.safetensors_file import UnreadableWeights
from torchtitan_flux.tensor_files.sources import Box, RenamedSource, Source
from torchtitan_flux.tensor_files.state_dict_keys import Shape, check_keys
from torchtitan_flux.weights import architecture
from torchtitan_flux.weights.dcp_source import DcpSource
from torchtitan_flux.weights.key_maps import Entry, foreign_shapes, layout_entries, our_shapes
from torchtitan_flux.weights.locations import Format, Trust, find, layout_of

Guidance = Literal["match", "drop", "initialize"]
Unknown = Literal["refuse", "drop"]

Bounds = list[tuple[int, int]]
"""First index and the one after the last, for each dimension."""

_TWIN = "time_in.in_layer.weight"
"""Whose element type new guidance weights get."""
_REMEDY = (
    'leave them out with checkpoint.unknown_weights = "drop" (when converting: --unknown_weights '
    "drop), or give a file without them"
)


class Weights:
    """A FLUX transformer's parameters under our names, wherever and however they are stored.

    Attributes:
        path: what was opened.
        format: what it is.
        args: the architecture that its parameters make up.
        stored: that of the file, before guidance was dropped or initialised.
        shapes, dtypes: of every parameter, by our name; dtypes as they are stored.
        left_out: unknown tensors that are not read.
    """

    def __init__(
        self,
        path: Path,
        format: Format,
        args: FluxModelArgs,
        source: Source,
        guidance: Guidance = "match",
        unknown: Unknown = "refuse",
    ) -> None:
        """Every key of `source` is accounted for here.

        Raises:
            KeyMismatch: names all that is missing, of another shape or, unless `unknown` is "drop",
                unknown.
            UnreadableWeights: guidance weights on one side only.
        """
        self.path, self.format, self.args = path, format, args
        has_guidance = any(name.startswith(architecture.GUIDANCE) for name in source.shapes)
        self.stored = stored = replace(args, guidance_embed=has_guidance)
        entries = layout_entries(layout_of(source.shapes), stored)
        expected = foreign_shapes(stored, entries)
        self.left_out = [one for one in source.shapes if one not in expected and unknown == "drop"]
        if self.left_out:
            source = RenamedSource(source, {one: one for one in source.shapes if one in expected})
        check_keys(source.shapes, expected, str(path), _REMEDY)
        self._source = source
        _check_guidance(path, stored.guidance_embed, args.guidance_embed, guidance)
        self._entries = {entry.ours: entry for entry in entries}
        self.shapes = our_shapes(args)
        self.dtypes = {
            name: joined_dtype(self._entries[name if name in self._entries else _TWIN], source)
            for name in self.shapes
        }

    def read(self, name: str, box: Box | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """A part of one of our parameters, in memory of its own.

        Reads only what holds the part: pages of a file, stored pieces of a DCP checkpoint.

        Args:
            name: our name.
            box: a slice (step 1) for each dimension; None for all of it.
            dtype: of the result; None for the stored one.

        Raises UnreadableWeights where the file cannot be read or `dtype` cannot hold a value.
        """
        shape = self.shapes[name]
        dtype = dtype or self.dtypes[name]
        bounds = [
            one.indices(size)[:2]
            for one, size in zip(box or [slice(None)] * len(shape), shape, strict=True)
        ]
        if name not in self._entries:
            return _new_guidance(name, shape, bounds).to(dtype)
        try:
            return read_joined(self._entries[name], self._source, bounds, dtype)
        except BeyondRange as error:
            raise UnreadableWeights(f"{self.path}: {error}") from None


def open_weights(
    path: str | Path,
    args: FluxModelArgs | None = None,
    guidance: Guidance = "match",
    alone: bool = False,
    flavor: FluxModelArgs | None = None,
    unknown: Unknown = "refuse",
    contents: bool = True,
    average: str | None = None,
) -> Weights:
    """Find out what a path holds, and check every key of it.

    Args:
        path: a file or folder in any of the formats above.
        args: the architecture to load into; None takes what the weights say of themselves.
        guidance: what to do where the weights and `args` differ in guidance (FLUX.1-dev has it,
            FLUX.1-schnell not). "match" refuses. "drop" leaves the file's guidance weights out.
            "initialize" makes new ones: the input layer as in a new model (seed 0), the output
            layer zero, so that the model computes what it computed without guidance, whatever
            guidance it is given, until it is trained.
        alone: this process asks no other one. Otherwise, where ranks are joined, all of them have
            to call this: each verifies a share of a checkpoint's files.
        flavor: without `args`, one that the weights are of, for what they do not say; widths
            that follow encoders, the number of blocks, and guidance, may differ from it.
        unknown: "refuse" names tensors that no FLUX.1 transformer has; "drop" leaves them out, with
            a line in the log.
        contents: whether the files of a checkpoint of ours are read and compared with its manifest;
            else only their sizes are.
        average: decay of the average of the weights to read from a checkpoint of ours, "" where
            there is only one; None reads the weights.

    Raises:
        UnreadableWeights: the path is none of these formats, or contradicts itself, or its
            architecture cannot be told; the message says what to do.
        KeyMismatch: names every key that is missing, unknown or of another shape.
        FileNotFoundError: there is nothing.
    """
    trust: Trust = "verify alone" if alone else "verify"
    found = find(Path(path), trust if contents else "sizes")
    path = found.path
    stored = found.source if average is None else DcpSource(path, average)
    source = ScaledSource(stored, path)
    if args is None:
        args = found.declared
        if args is None:
            args = architecture.from_shapes(path, source.shapes, flavor or found.flavor)
        elif flavor is not None:
            architecture.check_matches_flavor(path, asdict(args), flavor)
        wanted = {"match": args.guidance_embed, "drop": False, "initialize": True}[guidance]
        args = replace(args, guidance_embed=wanted)
    else:
        for name in ("axes_dim", "theta") if found.declared else ():  # shapes do not show these
            if (other := getattr(found.declared, name)) != getattr(args, name):
                raise UnreadableWeights(
                    f"{path} was made with {name} {other}, the model has {getattr(args, name)}; "
                    "take the flavor that it was made with"
                )
    weights = Weights(path, found.format, args, source, guidance, unknown)
    if contents:  # a mere check is no reading
        _log(weights, found.left_out)
    return weights


def _log(weights: Weights, other_parts: Sequence[str]) -> None:
    """Say what is left out, and what the weights are."""
    path = weights.path
    if other_parts:
        logger.info(f"{path}: {', '.join(other_parts)} are not read, only the transformer")
    if weights.left_out:
        logger.warning(
            f"{path}: {len(weights.left_out)} unknown tensors are left out: "
            f"{listed(weights.left_out, 20)}"
        )
    if weights.format == "torchtitan":
        logger.warning(
            f"{path} was trained by torchtitan 0.2's own FLUX, with causal attention in every "
            "block; here attention is bidirectional: train it further before use"
        )


def _check_guidance(path: Path, stored: bool, wanted: bool, guidance: Guidance) -> None:
    if stored and not wanted and guidance != "drop":
        raise UnreadableWeights(
            f"{path} has guidance weights (as FLUX.1-dev), the model has no place for them; take a "
            'flavor with guidance, or leave them out with checkpoint.guidance_weights = "drop" '
            "(when converting: --guidance_weights drop)"
        )
    if wanted and not stored and guidance != "initialize":
        raise UnreadableWeights(
            f"{path} has no guidance weights (as FLUX.1-schnell), the model needs them; take a "
            "flavor without guidance, or begin with new ones by checkpoint.guidance_weights = "
            '"initialize" (when converting: --guidance_weights initialize)'
        )


def _new_guidance(name: str, shape: Shape, bounds: Bounds) -> Tensor:
    """New guidance weights, whose contribution is zero until they are trained."""
    last = name.startswith(f"{architecture.GUIDANCE[0]}out_layer.")
    whole = torch.zeros(shape) if last else initial_rows(0, name, shape, 0, shape[0])
    return whole[tuple(slice(low, high) for low, high in bounds)].clone()


def joined_dtype(entry: Entry, source: Source) -> torch.dtype:
    """Element type of ours: that of its pieces, or where they differ one that holds them all."""
    dtypes = {source.dtypes[name] for name in entry.theirs}
    if len(dtypes) == 1:
        return dtypes.pop()
    return torch.float64 if torch.float64 in dtypes else torch.float32


def read_joined(entry: Entry, source: Source, bounds: Bounds, dtype: torch.dtype) -> Tensor:
    """The part of `entry.join(foreign tensors)` within `bounds`, without building the whole.

    Which foreign index each of ours comes from is found by sending numbers through the map; then
    whatever is contiguous on both sides is copied as one block.
    """
    axis = entry.axis
    out = torch.empty([high - low for low, high in bounds], dtype=dtype)
    if not out.numel():
        return out
    probes, end = [], 0
    for name in entry.theirs:
        shape = [1] * len(source.shapes[name])
        shape[axis] = source.shapes[name][axis]
        probes.append(torch.arange(end, end + shape[axis]).view(shape))
        end += shape[axis]
    low, high = bounds[axis]
    origin = entry.join(probes).flatten()[low:high]
    begin = 0
    for name, probe in zip(entry.theirs, probes, strict=True):
        end = begin + probe.numel()
        here = ((origin >= begin) & (origin < end)).nonzero().flatten()
        if len(here):
            _copy(out, here, origin[here] - begin, name, source, bounds, axis)
        begin = end
    return out


def _copy(
    out: Tensor, ours: Tensor, theirs: Tensor, name: str, source: Source, bounds: Bounds, axis: int
) -> None:
    """Copy indices `theirs` of one foreign tensor to indices `ours` of the result; BeyondRange."""
    first, last = int(theirs.min()), int(theirs.max()) + 1
    box = [slice(low, high) for low, high in bounds]
    box[axis] = slice(first, last)
    part = cast(source.part(name, tuple(box)), out.dtype, name)
    breaks = ((ours.diff() != 1) | (theirs.diff() != 1)).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    for start, end in zip(starts, [*starts[1:], len(ours)], strict=True):
        length = end - start
        out.narrow(axis, int(ours[start]), length).copy_(
            part.narrow(axis, int(theirs[start]) - first, length)
        )
    del part
    source.release(name)


@torch.no_grad()
def import_weights(parameters: Mapping[str, Tensor], weights: Weights) -> None:
    """Give parameters the values of a file or folder, in place and in their own dtype.

    No communication: every rank maps the files and reads the part that it holds, one parameter at a
    time. `parameters`: by canonical name, sharded in any dimensions; a pipeline rank has its own.
    """
    for name, parameter in parameters.items():
        shard = local(parameter)
        if shard.numel() == 0:
            continue
        # where nothing can be lost, the cast is the device's
        narrow = narrows(weights.dtypes[name], shard.dtype)
        values = weights.read(name, box_of(parameter), shard.dtype if narrow else None)
        assert values.shape == shard.shape, name  # copy_ would broadcast
        shard.copy_(values)
