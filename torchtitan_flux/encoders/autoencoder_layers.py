"""The convolutional networks of the FLUX.1 autoencoder, parameters named as in `ae.safetensors`.

Layout and arithmetic follow Black Forest Labs' reference: residual blocks with GroupNorm (32
groups, eps 1e-6) and swish, single-head attention at the lowest resolution, its projections stored
as 1x1 convolutions.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

NORM_GROUPS = 32
NORM_EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderArgs:
    """Shape of the autoencoder; the defaults are those of FLUX.1.

    Attributes:
        in_channels, out_ch: channels of the image encoded, and of the one decoded.
        ch: width of the first level; a multiple of 32.
        ch_mult: width of each level over `ch`, highest resolution first; each halves it.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        z_channels: latent channels.
        scale_factor, shift_factor: latent = scale_factor * (z - shift_factor).
    """

    in_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159
    out_ch: int = 3

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, highest resolution first."""
        return tuple(self.ch * multiple for multiple in self.ch_mult)

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along each axis."""
        return 2 ** (len(self.ch_mult) - 1)


class GroupNormSwish(nn.GroupNorm):
    """GroupNorm followed by swish, as before every convolution of a residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels, eps=NORM_EPS)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return F.silu(super().forward(input))


class ResnetBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); a 1x1 convolution of x where widths differ."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = GroupNormSwish(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNormSwish(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        return self.nin_shortcut(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class AttnBlock(nn.Module):
    """x + single-head self-attention over all cells of norm(x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        normed = self.norm(x)
        q, k, v = (
            rearrange(project(normed), "b c h w -> b 1 (h w) c")
            for project in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[-2]))


class Downsample(nn.Module):
    """Halves the resolution; padded on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h//2 w//2"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution by repetition, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 2*h 2*w"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, then the change of resolution where there is one."""

    def __init__(
        self, channels: int, out: int, blocks: int, downsample: bool = False, upsample: bool = False
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(out if j else channels, out) for j in range(blocks))
        self.downsample = Downsample(out) if downsample else nn.Identity()
        self.upsample = Upsample(out) if upsample else nn.Identity()

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h2 w2"]:
        for block in self.block:
            x = block(x)
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    """Images to the moments (mean, log variance) of the posterior."""

    def __init__(self, args: AutoencoderArgs) -> None:
        super().__init__()
        widths = args.widths
        self.conv_in = nn.Conv2d(args.in_channels, args.ch, 3, padding=1)
        above = (args.ch, *widths)
        last = len(widths) - 1
        self.down = nn.ModuleList(
            Level(above[i], width, args.num_res_blocks, downsample=i < last)
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1])
        self.norm_out = GroupNormSwish(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * args.z_channels, 3, padding=1)

    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b moments h w"]:
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out(self.mid(x)))


class Decoder(nn.Module):
    """Unnormalised latents z to images. `up[0]` is the highest resolution, hence run last."""

    def __init__(self, args: AutoencoderArgs) -> None:
        super().__init__()
        widths = args.widths
        self.conv_in = nn.Conv2d(args.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        below = (*widths[1:], widths[-1])
        self.up = nn.ModuleList(
            Level(below[i], width, args.num_res_blocks + 1, upsample=i > 0)
            for i, width in enumerate(widths)
        )
        self.norm_out = GroupNormSwish(widths[0])
        self.conv_out = nn.Conv2d(widths[0], args.out_ch, 3, padding=1)

    def forward(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c H W"]:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.norm_out(x))


@cache
def parameter_shapes(args: AutoencoderArgs) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter in BFL's layout (244 at the default args)."""
    with torch.device("meta"):
        halves = {"encoder": Encoder(args), "decoder": Decoder(args)}
    return {
        f"{half}.{name}": tuple(parameter.shape)
        for half, module in halves.items()
        for name, parameter in module.named_parameters()
    }
