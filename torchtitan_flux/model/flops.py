"""Arithmetic of one training image, for TFLOP/s and MFU, and for balanced pipeline stages."""

from typing import NamedTuple

from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model.args import FluxModelArgs


class PartFlops(NamedTuple):
    """Floating point operations of each part of the model, as `flops_per_image` counts them."""

    embedders: int
    double_block: int
    """One of them, as of the single blocks."""
    single_block: int
    final_layer: int


def flops_of_parts(
    args: FluxModelArgs, size: ImageSize | int | tuple[int, int], text_tokens: int
) -> PartFlops:
    """Operations of each part; arguments as of `flops_per_image`."""
    img = args.geometry.grid(ImageSize.of(size)).tokens
    total = img + text_tokens
    h, m = args.hidden_size, args.mlp_hidden

    per_stream_token = 3 * h * h + h * h + 2 * h * m
    double = total * per_stream_token + 2 * 6 * h * h
    single = total * (h * (3 * h + m) + (h + m) * h) + 3 * h * h
    embedders = img * args.in_channels * h + text_tokens * args.context_in_dim * h
    vectors = (256 * h + h * h) * (2 if args.guidance_embed else 1) + args.vec_in_dim * h + h * h
    final = img * h * args.out_channels + 2 * h * h
    attention = 12 * h * total * total
    return PartFlops(
        embedders=6 * (embedders + vectors),
        double_block=6 * double + attention,
        single_block=6 * single + attention,
        final_layer=6 * final,
    )


def flops_per_image(
    args: FluxModelArgs, size: ImageSize | int | tuple[int, int], text_tokens: int
) -> int:
    """Floating point operations of forward and backward for one image, without recomputation.

    Every matrix weight counts 2 in the forward and 4 in the backward pass, once for each token
    that it sees (modulation and embedders of vectors: once an image); bidirectional attention
    counts 12 * hidden * length per token and layer. Norms, rope and activations are left out.

    Args:
        args: the model.
        size: image size in pixels (one number: square).
        text_tokens: length of the text sequence, padding included.
    """
    parts = flops_of_parts(args, size, text_tokens)
    blocks = args.depth * parts.double_block + args.depth_single_blocks * parts.single_block
    return parts.embedders + blocks + parts.final_layer
