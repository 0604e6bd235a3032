"""The blocks of FLUX.1. Single-device arithmetic: no mesh, no I/O.

Fused weights are stored head-major, so that plain column- and row-parallel linears keep whole
heads on a rank for any tensor parallel degree that divides them:

    qkv_by_head      rows     (heads, 3, head_dim)
    linear1_by_head  rows     (heads, 3 * head_dim + mlp per head)
    linear2_by_head  columns  (heads, head_dim + mlp per head)

The number of local heads is therefore read from the activations, never from the arguments.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from torchtitan_flux.model.rope import apply_rope

NORM_EPS = 1e-6


class Linear(nn.Linear):
    """A linear that starts empty: every value is drawn by model/initial_values.py."""

    def reset_parameters(self) -> None:
        pass


class CastingLinear(Linear):
    """A linear that takes its input into the dtype of its weight.

    It stands where float32 inputs enter the compute dtype. FSDP is told not to cast inputs
    (it would cast times and position ids as well), so the model does it here, deliberately.
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


class MLPEmbedder(nn.Module):
    """Two linears with a SiLU between: embeds times, guidance and the pooled text vector."""

    def __init__(self, in_dim: int, hidden_size: int):
        super().__init__()
        self.in_layer = CastingLinear(in_dim, hidden_size)
        self.out_layer = Linear(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "b in_dim"]) -> Float[Tensor, "b hidden"]:
        return self.out_layer(F.silu(self.in_layer(x)))


class QKNorm(nn.Module):
    """RMSNorm over head_dim, with a learned weight each for queries and keys."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.key_norm = nn.RMSNorm(head_dim, eps=NORM_EPS)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class Attention(nn.Module):
    """Bidirectional attention over the joint sequence; the seam where context parallelism acts."""

    def forward(
        self,
        q: Float[Tensor, "b heads tokens dim"],
        k: Float[Tensor, "b heads tokens dim"],
        v: Float[Tensor, "b heads tokens dim"],
        table: Float[Tensor, "b 1 tokens half 2"],
    ) -> Float[Tensor, "b heads tokens dim"]:
        return F.scaled_dot_product_attention(
            apply_rope(q, table), apply_rope(k, table), v, is_causal=False
        )


class Modulation(nn.Module):
    """Linear(silu(vec)) cut into `sets` triples (shift, scale, gate), each [b, 1, hidden]."""

    def __init__(self, hidden_size: int, sets: int):
        super().__init__()
        self.sets = sets
        self.lin = Linear(hidden_size, 3 * sets * hidden_size)

    def forward(self, vec: Float[Tensor, "b hidden"]) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(3 * self.sets, dim=-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) * LayerNorm(x) + shift, the LayerNorm without weights."""
    return torch.addcmul(shift, 1 + scale, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS))


class SelfAttention(nn.Module):
    """Projections of one stream of a double block; attention itself is over both streams."""

    def __init__(self, hidden_size: int, head_dim: int, qkv_bias: bool):
        super().__init__()
        self.head_dim = head_dim
        self.qkv_by_head = Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.norm = QKNorm(head_dim)
        self.proj = Linear(hidden_size, hidden_size)

    def qkv(self, x: Float[Tensor, "b tokens hidden"]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (normalised) and v, each [b, heads, tokens, head_dim]."""
        b, tokens, _ = x.shape
        heads = self.qkv_by_head(x).view(b, tokens, -1, 3, self.head_dim)
        q, k, v = heads.permute(3, 0, 2, 1, 4).unbind(0)
        return *self.norm(q, k), v


def mlp(hidden_size: int, mlp_hidden: int) -> nn.Sequential:
    return nn.Sequential(
        Linear(hidden_size, mlp_hidden),
        nn.GELU(approximate="tanh"),
        Linear(mlp_hidden, hidden_size),
    )


def merge_heads(x: Float[Tensor, "b heads tokens dim"]) -> Float[Tensor, "b tokens hidden"]:
    return x.transpose(1, 2).flatten(2)


class DoubleStreamBlock(nn.Module):
    """Image and text each keep weights of their own and meet in joint attention, text first."""

    def __init__(self, hidden_size: int, head_dim: int, mlp_hidden: int, qkv_bias: bool):
        super().__init__()
        self.img_mod = Modulation(hidden_size, sets=2)
        self.img_attn = SelfAttention(hidden_size, head_dim, qkv_bias)
        self.img_mlp = mlp(hidden_size, mlp_hidden)
        self.txt_mod = Modulation(hidden_size, sets=2)
        self.txt_attn = SelfAttention(hidden_size, head_dim, qkv_bias)
        self.txt_mlp = mlp(hidden_size, mlp_hidden)
        self.attention = Attention()

    def forward(
        self,
        img: Float[Tensor, "b img hidden"],
        txt: Float[Tensor, "b txt hidden"],
        vec: Float[Tensor, "b hidden"],
        table: Float[Tensor, "b 1 tokens half 2"],
    ) -> tuple[Float[Tensor, "b img hidden"], Float[Tensor, "b txt hidden"]]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        img_qkv = self.img_attn.qkv(modulated_norm(img, img_shift1, img_scale1))
        txt_qkv = self.txt_attn.qkv(modulated_norm(txt, txt_shift1, txt_scale1))
        joint = [torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True)]
        attended = merge_heads(self.attention(*joint, table))
        txt_attended, img_attended = attended.split([txt.shape[1], img.shape[1]], dim=1)

        img = img + img_gate1 * self.img_attn.proj(img_attended)
        img = img + img_gate2 * self.img_mlp(modulated_norm(img, img_shift2, img_scale2))
        txt = txt + txt_gate1 * self.txt_attn.proj(txt_attended)
        txt = txt + txt_gate2 * self.txt_mlp(modulated_norm(txt, txt_shift2, txt_scale2))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side on the joint sequence, fused into two linears."""

    def __init__(self, hidden_size: int, head_dim: int, mlp_hidden: int):
        super().__init__()
        self.head_dim = head_dim
        self.mlp_per_head = mlp_hidden * head_dim // hidden_size
        self.linear1_by_head = Linear(hidden_size, 3 * hidden_size + mlp_hidden)
        self.linear2_by_head = Linear(hidden_size + mlp_hidden, hidden_size)
        self.norm = QKNorm(head_dim)
        self.modulation = Modulation(hidden_size, sets=1)
        self.attention = Attention()

    def forward(
        self,
        x: Float[Tensor, "b tokens hidden"],
        vec: Float[Tensor, "b hidden"],
        table: Float[Tensor, "b 1 tokens half 2"],
    ) -> Float[Tensor, "b tokens hidden"]:
        shift, scale, gate = self.modulation(vec)
        b, tokens, _ = x.shape
        fused = self.linear1_by_head(modulated_norm(x, shift, scale))
        fused = fused.view(b, tokens, -1, 3 * self.head_dim + self.mlp_per_head)
        qkv, hidden = fused.split([3 * self.head_dim, self.mlp_per_head], dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.head_dim)).permute(3, 0, 2, 1, 4).unbind(0)
        attended = self.attention(*self.norm(q, k), v, table).transpose(1, 2)
        by_head = torch.cat([attended, F.gelu(hidden, approximate="tanh")], dim=-1)
        return x + gate * self.linear2_by_head(by_head.flatten(2))


class FinalLayer(nn.Module):
    """Modulated norm (shift, scale) and the projection to velocity features."""

    def __init__(self, hidden_size: int, out_channels: int):
        super().__init__()
        self.linear = Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size))

    def forward(
        self, x: Float[Tensor, "b tokens hidden"], vec: Float[Tensor, "b hidden"]
    ) -> Float[Tensor, "b tokens out"]:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))
