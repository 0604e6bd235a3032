"""Model arguments and flavors. A flavor shows only its differences."""

from dataclasses import dataclass, fields, replace

from torchtitan_flux.latents import Geometry


@dataclass(frozen=True)
class FluxModelArgs:
    """Architecture of a FLUX transformer, and how images are cut into its tokens.

    Attributes:
        in_channels: features of an image token that goes in.
        out_channels: features of an image token that comes out.
        vec_in_dim: width of the pooled text vector `y`.
        context_in_dim: features of a text token.
        hidden_size: width of the transformer.
        mlp_ratio: MLP width over hidden_size.
        num_heads: attention heads; divides hidden_size, and hidden_size * mlp_ratio.
        depth: double-stream blocks.
        depth_single_blocks: single-stream blocks.
        axes_dim: rotary dimensions of each position axis; sum to hidden_size / num_heads.
        theta: base of the rotary frequencies.
        qkv_bias: whether the double blocks' qkv projections have a bias.
        guidance_embed: whether the model takes a guidance value (FLUX.1-dev).
        downscale: pixels per latent cell, 8 with the FLUX.1 autoencoder, 1 in pixel space.
        patch_size: latent cells per token along each axis. The model itself sees only tokens.

    Raises:
        ValueError: names the argument that does not fit.
    """

    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = False
    downscale: int = 8
    patch_size: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        for field in fields(self):
            least = 0 if field.name.startswith("depth") else 1
            if field.type is int and getattr(self, field.name) < least:
                raise ValueError(
                    f"{field.name} must be at least {least}, not {getattr(self, field.name)}"
                )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
            )
        width = self.hidden_size * self.mlp_ratio
        if width < 1 or width != int(width) or width % self.num_heads:
            raise ValueError(
                f"hidden_size * mlp_ratio = {width} is not a positive multiple of num_heads "
                f"{self.num_heads}"
            )
        if any(dim < 2 or dim % 2 for dim in self.axes_dim):
            raise ValueError(f"axes_dim must be positive even numbers, not {self.axes_dim}")
        if sum(self.axes_dim) != self.head_dim:
            raise ValueError(
                f"axes_dim {self.axes_dim} must sum to hidden_size / num_heads = {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def geometry(self) -> Geometry:
        """How images become tokens of this flavor."""
        return Geometry(
            channels=self.in_channels // self.patch_size**2,
            downscale=self.downscale,
            patch=self.patch_size,
        )

    @property
    def pixel_space(self) -> bool:
        """Whether the flavor works on pixels, without an autoencoder."""
        return self.downscale == 1


_FLUX_12B = FluxModelArgs()
_PIXELS = replace(  # 1 channel here, `encoder.pixel_channels = 3` for colour
    _FLUX_12B, in_channels=4, out_channels=4, vec_in_dim=32, context_in_dim=32, downscale=1
)

FLAVORS: dict[str, FluxModelArgs] = {
    "flux-dev": replace(_FLUX_12B, guidance_embed=True),
    "flux-schnell": _FLUX_12B,
    "flux-debug": replace(
        _FLUX_12B, hidden_size=1536, num_heads=12, depth=2, depth_single_blocks=2
    ),
    "flux-mnist": replace(
        _PIXELS,
        hidden_size=384,
        num_heads=6,
        depth=6,
        depth_single_blocks=8,
        axes_dim=(16, 24, 24),
    ),
    "flux-digits": replace(
        _PIXELS, hidden_size=128, num_heads=4, depth=2, depth_single_blocks=4, axes_dim=(8, 12, 12)
    ),
    "flux-tiny": replace(
        _FLUX_12B,
        vec_in_dim=32,
        context_in_dim=32,
        hidden_size=192,
        num_heads=8,
        depth=2,
        depth_single_blocks=2,
        axes_dim=(8, 8, 8),
    ),
}

EMBEDDERS = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in")
"""Modules that take inputs to the width of the model."""

FIXED_WIDTH_FLAVORS = ("flux-dev", "flux-schnell")
"""Published models: text and latent widths are part of the flavor. Others follow the encoders."""
