"""Arithmetic of one training image, for TFLOP/s and MFU."""

from torchtitan_flux.latents import ImageSize
from torchtitan_flux.model.args import FluxModelArgs


def flops_per_image(
    args: FluxModelArgs, size: ImageSize | int | tuple[int, int], text_tokens: int
) -> int:
    """Floating point operations of forward and backward for one image, without recomputation.

    Every matrix weight counts 2 in the forward and 4 in the backward pass, once for each token
    that it sees (modulation and embedders of vectors: once an image); bidirectional attention
    counts 12 * hidden * length per token and layer. Norms, rope and activations are left out.
    `size` is in pixels (one number: square); `text_tokens` counts padding.
    """
    img = args.geometry.grid(ImageSize.of(size)).tokens
    total = img + text_tokens
    h, m = args.hidden_size, args.mlp_hidden

    per_stream_token = 3 * h * h + h * h + 2 * h * m
    double = total * per_stream_token + 2 * 6 * h * h
    single = total * (h * (3 * h + m) + (h + m) * h) + 3 * h * h
    embedders = img * args.in_channels * h + text_tokens * args.context_in_dim * h
    vectors = (256 * h + h * h) * (2 if args.guidance_embed else 1) + args.vec_in_dim * h + h * h
    final = img * h * args.out_channels + 2 * h * h
    blocks = args.depth * double + args.depth_single_blocks * single
    attention = 12 * h * total * total * (args.depth + args.depth_single_blocks)
    return 6 * (embedders + vectors + blocks + final) + attention
