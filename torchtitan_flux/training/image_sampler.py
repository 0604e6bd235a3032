"""Drawing on all data ranks: each draws its share of the pictures, every rank gets all of them."""

from collections.abc import Sequence

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchtitan.tools.logging import logger

from torchtitan_flux.collectives import all_gather_rows, shard_rows
from torchtitan_flux.latents import Geometry
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.sampling.generate import SampleSettings, generate
from torchtitan_flux.training.conditioning import FrozenEncoders


class ImageSampler:
    """Draws with a model that the data ranks share; picture i starts from noise (seed, i).

    A rank draws `batch_size` pictures at once.
    """

    def __init__(
        self,
        model: nn.Module,
        encoders: FrozenEncoders,
        geometry: Geometry,
        dims: FluxParallelDims,
        batch_size: int = 64,
    ):
        self.model = model
        self.encoders = encoders
        self.geometry = geometry
        self.group = dims.data_group
        self.batch_size = batch_size

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], settings: SampleSettings, negative_prompt: str = ""
    ) -> Float[Tensor, "n c H W"]:
        """One image in [-1, 1] for each prompt, on the CPU of every rank, in the prompts' order.

        A picture that is not finite is black, and an error in the log that names its prompt:
        drawing shows a run, it does not end it.
        """
        was_training = self.model.training
        self.model.eval()
        drawn = []
        for batch in shard_rows(torch.arange(len(prompts)), self.group).split(self.batch_size):
            indices: list[int] = batch.tolist()
            images = generate(
                self.model,
                self.encoders.codec,
                self.encoders.encode_captions,
                self.geometry,
                [prompts[i] for i in indices],
                indices,
                settings,
                negative_prompt,
                self.encoders.device,
            )
            drawn.append(images)
        self.model.train(was_training)
        images = all_gather_rows(torch.cat(drawn), len(prompts), self.group).cpu()
        bad = images.isnan().flatten(1).any(1)
        if torch.distributed.get_rank() == 0:
            for i in bad.nonzero().flatten().tolist():
                logger.error(f"Picture {i} of {prompts[i]!r} is not finite; it is drawn black")
        return images.masked_fill(bad.view(-1, 1, 1, 1), -1.0)
