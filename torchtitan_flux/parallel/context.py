"""Context parallelism: every rank holds a part of each sequence, except inside attention.

Ulysses (DeepSpeed-Ulysses, arXiv:2309.14509): one all-to-all gives a rank all tokens of some of
the heads, another gives it its own tokens of all heads back. Text and image are cut separately, so
that every rank has its share of both; inside attention tokens therefore stand as text 0, image 0,
text 1, image 1 …, which attention without a mask does not notice: positions are in q and k.

A stream whose length does not divide is filled up with pads. They are left out of attention, so no
token sees them, and cut off the model's output, so they have no gradient.
"""

import functools
import inspect
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_flux.model.layers import Attention
from torchtitan_flux.model.rope import apply_rope

TOKENS = ("img", "img_ids", "txt", "txt_ids")
"""Arguments of the model that are cut along their second dimension."""


def apply_context_parallel(model: nn.Module, mesh: DeviceMesh, gather: bool = True) -> None:
    """Cut the model's sequences over `mesh`, in place.

    The model is still called with whole sequences and returns the whole velocity, on every rank. A
    loss on it counts once, not once for each rank: a rank back-propagates its own tokens only, and
    the ranks' parameter gradients are to be summed.

    `gather`: whether the model's output is the velocity; inner pipeline stages pass tokens on.
    """
    sequences = Sequences(mesh.get_group())
    for name, module in list(model.named_modules()):
        if isinstance(module, Attention):
            model.set_submodule(name, ContextAttention(sequences))
    signature = inspect.signature(model.forward)

    def cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = signature.bind(*args, **kwargs)
        img_ids, txt_ids = call.arguments["img_ids"], call.arguments["txt_ids"]
        sequences.begin(img_ids.shape[1], txt_ids.shape[1], img_ids.device)
        for name in TOKENS:
            if name in call.arguments:
                call.arguments[name] = sequences.local_shard(call.arguments[name])
        return call.args, call.kwargs

    def join(_: nn.Module, args: Any, velocity: Tensor) -> Tensor:
        return _Join.apply(velocity, sequences)  # type: ignore[no-any-return]

    model.register_forward_pre_hook(cut, with_kwargs=True)
    if gather:
        model.register_forward_hook(join)


class Sequences:
    """How the sequences of the current call are cut; one for all blocks of a model."""

    def __init__(self, group: ProcessGroup):
        self.group = group
        self.ranks = group.size()
        self.rank = group.rank()
        self.img_tokens = 0  # of the whole image
        self.valid: Tensor | None = None  # as of `_valid_index`

    def begin(self, img_tokens: int, txt_tokens: int, device: torch.device) -> None:
        """The next call has sequences of these lengths."""
        self.img_tokens = img_tokens
        self.valid = _valid_index(self.ranks, (txt_tokens, img_tokens), device)

    def local_shard(self, x: Tensor) -> Tensor:
        """This rank's share of a whole sequence [b, tokens, …], pads at its end."""
        share = tokens_per_rank(x.shape[1], self.ranks)
        own = x[:, self.rank * share : (self.rank + 1) * share]
        pads = share - own.shape[1]
        return F.pad(own, (0, 0) * (x.ndim - 2) + (0, pads)) if pads else own.contiguous()


def tokens_per_rank(tokens: int, ranks: int) -> int:
    """Length of a rank's share of a sequence, pads included."""
    return -(-tokens // ranks)


@functools.cache
def _valid_index(ranks: int, lengths: tuple[int, int], device: torch.device) -> Tensor | None:
    """Index of tokens among tokens and pads of all ranks; None where there are no pads.

    Cached: finding them makes a GPU wait, once for each size.
    """
    if not any(tokens % ranks for tokens in lengths):
        return None
    shares = [tokens_per_rank(tokens, ranks) for tokens in lengths]
    valid = [
        torch.arange(rank * share, (rank + 1) * share) < tokens
        for rank in range(ranks)
        for tokens, share in zip(lengths, shares, strict=True)
    ]
    return torch.cat(valid).nonzero()[:, 0].to(device)


class ContextAttention(Attention):
    """Attention over the tokens of all ranks; arguments and result are this rank's."""

    def __init__(self, sequences: Sequences):
        super().__init__()
        self.sequences = sequences

    def forward(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        q, k = apply_rope(q, table), apply_rope(k, table)
        ranks, valid = self.sequences.ranks, self.sequences.valid
        b, heads, tokens, dim = q.shape
        # [to rank, q k v, b, heads of that rank, tokens, dim] -> [.., tokens of all ranks, dim]
        sent = torch.stack([q, k, v]).unflatten(2, (ranks, heads // ranks)).movedim(2, 0)
        whole = self._exchange(sent).permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
        if valid is not None:
            whole = whole[:, :, :, valid]
        q, k, v = whole.unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=False)
        if valid is not None:
            padded = attended.new_zeros(b, heads // ranks, ranks * tokens, dim)
            attended = padded.index_copy(2, valid, attended)
        # [to rank, b, heads, tokens of that rank, dim] -> [b, heads of all ranks, tokens, dim]
        returned = attended.unflatten(2, (ranks, tokens)).movedim(2, 0)
        return self._exchange(returned).movedim(0, 1).flatten(1, 2)

    def _exchange(self, x: Tensor) -> Tensor:
        """Slice i of dimension 0 goes to rank i; slice i of the result came from rank i."""
        return collectives.all_to_all_single_autograd(
            x.contiguous(), None, None, self.sequences.group
        )


class _Join(torch.autograd.Function):
    """Own tokens [b, share, c] -> all of them [b, tokens, c].

    Every rank computes the same loss of it, so its gradient is cut again, not summed.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, own: Tensor, sequences: Sequences) -> Tensor:
        ctx.sequences = sequences  # type: ignore[attr-defined]
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format)
                 for _ in range(sequences.ranks)]  # fmt: skip
        dist.all_gather(parts, own.contiguous(), group=sequences.group)
        joined = torch.cat(parts, dim=1)
        pads = joined.shape[1] > sequences.img_tokens
        return joined[:, : sequences.img_tokens].contiguous() if pads else joined

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.sequences.local_shard(grad), None
