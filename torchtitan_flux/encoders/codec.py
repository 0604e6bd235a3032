"""What stands between pixels and latents: the codec protocol and the identity codec."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Codec(Protocol):
    """Maps images to latents and back. Frozen: no gradient flows through it.

    Attributes:
        channels: latent channels.
        downscale: pixels per latent cell along each axis.
        stochastic: whether `encode` samples a posterior, that is, has a use for noise.
    """

    channels: int
    downscale: int
    stochastic: bool

    def encode(
        self, images: Float[Tensor, "b c H W"], noise: Float[Tensor, "b ch h w"] | None = None
    ) -> Float[Tensor, "b ch h w"]:
        """Latents of images in [-1, 1], normalised as the model sees them, in the images' dtype.

        `noise`, standard normal, picks a sample of the posterior; None gives its mean. A codec that
        is not stochastic ignores it.
        """
        ...

    def decode(self, latents: Float[Tensor, "b ch h w"]) -> Float[Tensor, "b c H W"]:
        """Images, nominally in [-1, 1] and not clipped, in the dtype of `latents`."""
        ...


class PixelCodec:
    """The identity: the model works on pixels themselves."""

    downscale: int = 1
    stochastic: bool = False

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def encode(
        self, images: Float[Tensor, "b c H W"], noise: Float[Tensor, "b c H W"] | None = None
    ) -> Float[Tensor, "b c H W"]:
        return images

    def decode(self, latents: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        return latents
