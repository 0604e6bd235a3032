"""Bytes of tensors that are alive, and messages of ranks, operation by operation.

Works on fake tensors, where nothing is allocated, and on real ones.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Messages = Counter[tuple[str, str]]
"""(kind of collective, dimension of the mesh) -> bytes of the whole: what an all-gather gives, a
reduce-scatter or an all-to-all takes, an all-reduce keeps."""

COLLECTIVES = {
    "c10d::_allgather_base_": "all-gather",
    "c10d::allgather_": "all-gather",
    "_c10d_functional::all_gather_into_tensor": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "_c10d_functional::reduce_scatter_tensor": "reduce-scatter",
    "c10d::allreduce_": "all-reduce",
    "_c10d_functional::all_reduce": "all-reduce",
    "_c10d_functional::all_to_all_single": "all-to-all",
}
"""Operation -> kind. What is not here (waiting) sends nothing."""


@dataclass(frozen=True)
class Segment:
    """A piece of a step, such as the forward pass of one block. Bytes on one rank.

    Attributes:
        phase: "begin", "forward", "backward" …
        kind: of block; empty for what there is once.
        number: of the block.
        kept: more alive at the end than at the beginning.
        rise: most alive at any moment, beyond what was at the beginning.
        messages: that this rank takes part in.
    """

    phase: str
    kind: str = ""
    number: int = 0
    kept: int = 0
    rise: int = 0
    messages: Messages = field(default_factory=Counter)


@dataclass(frozen=True)
class Timeline:
    """The segments of a step, in order."""

    segments: Sequence[Segment]

    @property
    def peak(self) -> int:
        """Most bytes at any moment, beyond what was there before."""
        alive = peak = 0
        for segment in self.segments:
            peak = max(peak, alive + segment.rise)
            alive += segment.kept
        return peak

    @property
    def microbatches(self) -> list[list[Segment]]:
        """The segments, cut where a forward pass follows a backward pass."""
        found: list[list[Segment]] = [[]]
        for segment in self.segments:
            if segment.phase == "forward" and found[-1] and found[-1][-1].phase == "backward":
                found.append([])
            found[-1].append(segment)
        return found

    @property
    def activations(self) -> int:
        """Bytes at the end of the (last) forward pass, beyond what was there before it."""
        return sum(s.kept for s in self.microbatches[-1] if s.phase == "forward")

    def messages(self, microbatches: int = 1) -> Messages:
        """Of a step of this many microbatches; the timeline has two of them, or the only one."""
        each = [sum((s.messages for s in part), Counter()) for part in self.microbatches]
        total = sum(each, Counter())
        for (kind, dimension), size in each[-1].items():
            # gradients are reduced in the last one only
            if dimension != "replicate" and kind != "reduce-scatter":
                total[kind, dimension] += (microbatches - len(each)) * size
        return total

    def repeated(self, counts: Mapping[str, int]) -> "Timeline":
        """The same step with `counts` blocks of each kind: where three were run, the middle one
        stands for all but the first and the last."""
        run = Counter(kind for kind, _ in {(s.kind, s.number) for s in self.segments})
        segments: list[Segment] = []
        for segment in self.segments:
            middle = segment.kind and segment.number == 1 and run[segment.kind] == 3
            segments += [segment] * (counts[segment.kind] - 2 if middle else 1)
        return Timeline(segments)


class MemoryTracker(TorchDispatchMode):
    """Counts the storages of tensors while they live, and the messages of collectives.

    Attributes:
        alive: bytes now.
        peak: most bytes since the last mark.
        segments: what was between two marks.

    Args:
        dimensions: name of a process group -> dimension of the mesh; other groups are "world".
    """

    def __init__(self, dimensions: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.dimensions = dimensions or {}
        self.alive = 0
        self.peak = 0
        self.segments: list[Segment] = []
        self._label: tuple[str, str, int] = ("begin", "", 0)
        self._alive_before = 0
        self._messages: Messages = Counter()
        self._sizes: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
        self._paused = False

    def mark(self, phase: str, kind: str = "", number: int = 0) -> None:
        """End the segment that goes on, and begin this one."""
        before = self._alive_before
        kept, rise = self.alive - before, self.peak - before
        self.segments.append(Segment(*self._label, kept, rise, self._messages))
        self._label, self._messages = (phase, kind, number), Counter()
        self._alive_before = self.peak = self.alive

    def note(self, tensor: Tensor) -> None:
        """Count a tensor made elsewhere; once, however often it is noted."""
        storage = tensor.untyped_storage()
        if self._paused or storage in self._sizes:
            return
        size = [storage.nbytes()]
        self._sizes[storage] = size
        self._add(size[0])
        weakref.finalize(storage, lambda: self._add(-size[0]))

    def _add(self, size: int) -> None:
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its parts come by here one by one
        result = func(*args, **(kwargs or {}))
        if func._schema.name in COLLECTIVES and not self._paused:
            names = [argument.name for argument in func._schema.arguments]
            self._note_message(
                COLLECTIVES[func._schema.name],
                dict(zip(names, args, strict=False)) | (kwargs or {}),
            )
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return result

    def _note_message(self, kind: str, arguments: dict[str, Any]) -> None:
        if "group_name" in arguments:
            group = dist.distributed_c10d._resolve_process_group(arguments["group_name"])
        else:
            group = dist.ProcessGroup.unbox(arguments["process_group"])
        whole = {"all-gather": ("output_tensor", "output_tensors", "input")}
        names = whole.get(kind, ("input_tensor", "tensors", "input"))
        name = next(n for n in names if n in arguments)
        size = sum(t.nbytes for t in tree_leaves(arguments[name]) if isinstance(t, Tensor))
        if (kind, name) == ("all-gather", "input"):
            size *= group.size()
        self._messages[kind, self.dimensions.get(group.group_name, "world")] += size

    def __enter__(self) -> "MemoryTracker":
        # Neither is seen by a dispatch mode: FSDP frees by resizing storages, and DTensor looks
        # shapes up by running each operation on fake tensors of the whole size.
        resize = torch.UntypedStorage.resize_
        look_up = ShardingPropagator._propagate_tensor_meta_non_cached

        def resized(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if known := self._sizes.get(storage):
                self._add(storage.nbytes() - known[0])
                known[0] = storage.nbytes()

        def looked_up(*args: Any, **kwargs: Any) -> Any:
            self._paused = True
            try:
                return look_up(*args, **kwargs)
            finally:
                self._paused = False

        self._patches = contextlib.ExitStack()
        for owner, name, new in (
            (torch.UntypedStorage, "resize_", resized),
            (ShardingPropagator, look_up.__name__, looked_up),
        ):
            self._patches.enter_context(mock.patch.object(owner, name, new))
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *exception: Any) -> None:
        self._patches.close()
        super().__exit__(*exception)


def ring_bytes(kind: str, ranks: int, message: int) -> int:
    """Bytes that one rank sends for a collective of this kind over `message` bytes, on a ring."""
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * message * (ranks - 1) // ranks
