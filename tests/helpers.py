"""Small things that many tests need."""

import torch
from torch import Tensor, nn

from torchtitan_flux.model import FluxModel, FluxModelArgs


def relative_l2(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference| in float64."""
    difference = (value.double() - reference.double()).norm()
    return (difference / reference.double().norm()).item()


@torch.no_grad()
def randomize(module: nn.Module, seed: int, scale: float = 1.0) -> nn.Module:
    """Give every parameter non-zero values: norm weights near 1, matrices of variance 1/fan-in.

    At the DiT start 78 of 80 gradients vanish and any comparison passes.
    """
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float32)
        if parameter.ndim > 1:
            parameter.copy_(scale * noise / parameter[0].numel() ** 0.5)
        elif "norm" in name:
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(0.1 * noise)
    return module


def data_dims(replicate: int, shard: int):
    """Dimensions of a mesh without peers."""
    from torchtitan_flux.parallel.dims import FluxParallelDims

    return FluxParallelDims(replicate, shard, 1, 1, 1, 1, 1, replicate * shard)


def model_inputs(
    args: FluxModelArgs, b: int, rows: int, cols: int, text: int, seed: int
) -> dict[str, Tensor]:
    """Random inputs of a FLUX.1 call: rows x cols image tokens, `text` text tokens."""
    from torchtitan_flux.latents import TokenGrid, image_ids, text_ids

    rng = torch.Generator().manual_seed(seed)
    inputs = {
        "img": torch.randn(b, rows * cols, args.in_channels, generator=rng),
        "img_ids": image_ids(TokenGrid(rows, cols), b),
        "txt": torch.randn(b, text, args.context_in_dim, generator=rng),
        "txt_ids": text_ids(text, b),
        # 1000 t is exact in bf16, and so is 1000 times the guidance below
        "timesteps": 2.0 ** -(1 + torch.arange(b) % 3).float(),
        "y": torch.randn(b, args.vec_in_dim, generator=rng),
    }
    if args.guidance_embed:
        inputs["guidance"] = 2.0 ** (torch.arange(b) % 3).float()
    return inputs


def nonzero_model(args: FluxModelArgs, seed: int = 0) -> FluxModel:
    """A model with random non-zero parameters throughout."""
    return randomize(FluxModel(args), seed)  # type: ignore[return-value]


def diffusers_forward(theirs: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What diffusers' FluxTransformer2DModel makes of the inputs of `model_inputs`."""
    return theirs(
        hidden_states=inputs["img"],
        encoder_hidden_states=inputs["txt"],
        pooled_projections=inputs["y"],
        timestep=inputs["timesteps"],
        img_ids=inputs["img_ids"][0],
        txt_ids=inputs["txt_ids"][0],
        guidance=inputs.get("guidance"),
        return_dict=False,
    )[0]
