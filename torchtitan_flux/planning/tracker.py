"""Bytes of tensors that are alive, and bytes that ranks send each other, operation by operation.

Works on fake tensors, where nothing is allocated, and on real ones.
"""

import weakref
from collections import Counter
from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchtitan_flux.planning.timeline import Segment

COLLECTIVES = {
    "c10d::_allgather_base_": "all-gather",
    "c10d::allgather_": "all-gather",
    "_c10d_functional::all_gather_into_tensor": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "_c10d_functional::reduce_scatter_tensor": "reduce-scatter",
    "c10d::allreduce_": "all-reduce",
    "_c10d_functional::all_reduce": "all-reduce",
    "_c10d_functional::all_to_all_single": "all-to-all",
    "c10d::send": "send",
}
"""Operation -> kind. What is not here (waiting, receiving) sends nothing."""


class MemoryTracker(TorchDispatchMode):
    """Counts the storages of tensors while they live, and the messages of collectives.

    Attributes:
        alive: bytes now.
        peak: most bytes since the last mark.
        segments: what was between two marks.
        sent, calls: messages since the last mark: bytes that this rank sends on a ring, how often.

    Args:
        dimensions: name of a process group -> dimension of the mesh; other groups are "world".
    """

    def __init__(self, dimensions: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.dimensions = dimensions or {}
        self.alive = 0
        self.peak = 0
        self.segments: list[Segment] = []
        self.sent: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        self._begun: tuple[str, str, int] = ("begin", "", 0)
        self._alive_then = 0
        self._sizes: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
        self._paused = False

    def mark(self, phase: str, kind: str = "", number: int = 0) -> None:
        """What went on until now ends, and this begins."""
        then = self._alive_then
        kept, rise = self.alive - then, self.peak - then
        self.segments.append(Segment(*self._begun, kept, rise, dict(self.sent), dict(self.calls)))
        self._begun, self._alive_then, self.peak = (phase, kind, number), self.alive, self.alive
        self.sent.clear()
        self.calls.clear()

    def note(self, tensor: Tensor) -> None:
        """Count a tensor made elsewhere; once, however often it is noted."""
        storage = tensor.untyped_storage()
        if self._paused or storage in self._sizes:
            return
        size = [storage.nbytes()]
        self._sizes[storage] = size
        self._add(size[0])
        weakref.finalize(storage, self._forget, size)

    def _add(self, size: int) -> None:
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def _forget(self, size: list[int]) -> None:
        self.alive -= size[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its parts come by here one by one
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and not self._paused:
            self._note_message(func, args, kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return result

    def _note_message(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func._schema.name
        if name not in COLLECTIVES:
            return
        kind = COLLECTIVES[name]
        bound = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
        group = _group(bound)
        if group.size() > 1:
            key = kind, self.dimensions.get(group.group_name, "world")
            self.sent[key] += ring_bytes(kind, group.size(), _message(kind, bound, group.size()))
            self.calls[key] += 1

    def __enter__(self) -> "MemoryTracker":
        # Neither is seen by a dispatch mode: FSDP frees by resizing storages, and DTensor looks
        # shapes up by running each operation on fake tensors of the whole size.
        self._resize, self._look_up = (
            torch.UntypedStorage.resize_,
            ShardingPropagator._propagate_tensor_meta_non_cached,
        )
        resize, look_up = self._resize, self._look_up

        @wraps(resize)
        def resized(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            known = self._sizes.get(storage)
            if known is not None:
                self._add(storage.nbytes() - known[0])
                known[0] = storage.nbytes()

        @wraps(look_up)
        def looked_up(*args: Any, **kwargs: Any) -> Any:
            self._paused = True
            try:
                return look_up(*args, **kwargs)
            finally:
                self._paused = False

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        ShardingPropagator._propagate_tensor_meta_non_cached = looked_up  # type: ignore
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        ShardingPropagator._propagate_tensor_meta_non_cached = self._look_up  # type: ignore
        super().__exit__(*exception)


def ring_bytes(kind: str, ranks: int, message: int) -> int:
    """Bytes that one rank sends for a collective over `message` bytes, on a ring.

    Args:
        kind: a value of COLLECTIVES.
        ranks: in the group.
        message: bytes of the whole: what an all-gather gives, a reduce-scatter or an all-to-all
            takes, an all-reduce keeps, a send sends.
    """
    if kind == "send":
        return message
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * message * (ranks - 1) // ranks


def _group(bound: dict[str, Any]) -> Any:
    if "group_name" in bound:
        return dist.distributed_c10d._resolve_process_group(bound["group_name"])
    return dist.ProcessGroup.unbox(bound["process_group"])


def _message(kind: str, bound: dict[str, Any], ranks: int) -> int:
    whole = {"all-gather": ("output_tensor", "output_tensors", "input")}
    names = whole.get(kind, ("input_tensor", "tensors", "input"))
    name = next(n for n in names if n in bound)
    size = sum(t.nbytes for t in tree_leaves(bound[name]) if isinstance(t, Tensor))
    return size * ranks if (kind, name) == ("all-gather", "input") else size
