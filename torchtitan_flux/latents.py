"""Sizes in pixels, latents and packed tokens: the only home of downscale and patch arithmetic."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ImageSize:
    """Size of an image in pixels."""

    height: int
    width: int

    @classmethod
    def of(cls, size: "ImageSize | int | tuple[int, int]") -> "ImageSize":
        """Accept an ImageSize, (height, width), or one number for a square."""
        if isinstance(size, ImageSize):
            return size
        if isinstance(size, int):
            return cls(size, size)
        height, width = size
        return cls(height, width)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


@dataclass(frozen=True)
class TokenGrid:
    """Rows and columns of packed image tokens."""

    rows: int
    cols: int

    @property
    def tokens(self) -> int:
        return self.rows * self.cols


@dataclass(frozen=True)
class Geometry:
    """How an image becomes tokens: codec downscale first, then square patches.

    Attributes:
        channels: latent channels (16 for the FLUX.1 autoencoder, 1 or 3 in pixel space).
        downscale: pixels per latent cell along each axis (8, or 1 in pixel space).
        patch: latent cells per token along each axis (2 for FLUX.1).
    """

    channels: int
    downscale: int
    patch: int

    @property
    def pixels_per_token(self) -> int:
        """Side of the pixel square that one token stands for; sizes must be multiples of it."""
        return self.downscale * self.patch

    @property
    def token_features(self) -> int:
        return self.channels * self.patch**2

    def check(self, size: ImageSize) -> None:
        """Raise ValueError when the size is not a positive multiple of `pixels_per_token`."""
        step = self.pixels_per_token
        for name, value in (("height", size.height), ("width", size.width)):
            if value < step or value % step:
                raise ValueError(
                    f"image {name} {value} is not a positive multiple of {step} pixels "
                    f"(codec downscale {self.downscale} x patch {self.patch})"
                )

    def latent_shape(self, size: ImageSize) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of an image of `size` pixels."""
        self.check(size)
        return self.channels, size.height // self.downscale, size.width // self.downscale

    def grid(self, size: ImageSize) -> TokenGrid:
        """Packed token grid of an image of `size` pixels."""
        self.check(size)
        step = self.pixels_per_token
        return TokenGrid(size.height // step, size.width // step)


def pack(latents: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b tokens features"]:
    """Cut latents into patch x patch squares, row by row; features are (channel, row, column)."""
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=patch, pw=patch)


def unpack(
    tokens: Float[Tensor, "b tokens features"], grid: TokenGrid, patch: int
) -> Float[Tensor, "b c h w"]:
    """The inverse of `pack` for the given token grid."""
    h, w = grid.rows, grid.cols
    pattern = "b (h w) (c ph pw) -> b c (h ph) (w pw)"
    return rearrange(tokens, pattern, h=h, w=w, ph=patch, pw=patch)


def image_ids(
    grid: TokenGrid, batch: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "b tokens 3"]:
    """Position ids (0, row, column) of image tokens, float32."""
    rows = torch.arange(grid.rows, dtype=torch.float32, device=device)
    cols = torch.arange(grid.cols, dtype=torch.float32, device=device)
    row, col = torch.meshgrid(rows, cols, indexing="ij")
    ids = torch.stack([torch.zeros_like(row), row, col], dim=-1)
    return ids.reshape(1, -1, 3).expand(batch, -1, -1)


def text_ids(
    tokens: int, batch: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "b tokens 3"]:
    """Position ids of text tokens in FLUX.1: all zero, float32."""
    return torch.zeros(batch, tokens, 3, dtype=torch.float32, device=device)
