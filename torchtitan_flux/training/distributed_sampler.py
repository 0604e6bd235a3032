"""Drawing on all ranks: each takes its share of the pictures, every rank gets all of them."""

from collections.abc import Sequence
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchtitan.tools.logging import logger

from torchtitan_flux.image_file import save_picture
from torchtitan_flux.latents import Geometry
from torchtitan_flux.parallel.dims import FluxParallelDims
from torchtitan_flux.sampling.euler import FirstNotFinite
from torchtitan_flux.sampling.generate import SampleSettings, generate, image_grid, to_pil
from torchtitan_flux.training.conditioning import FrozenEncoders


class Painter:
    """Draws pictures with a model that is shared by the data ranks.

    Picture i starts from noise (seed, i), so the pictures do not depend on the number of ranks.

    Args:
        model: FluxModel after parallelize_flux.
        encoders: with codec and device.
        geometry: of the flavor.
        dims: data ranks draw different pictures.
        batch_size: pictures drawn at once.
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
        self.dims = dims
        self.batch_size = batch_size

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[str], settings: SampleSettings, negative_prompt: str = ""
    ) -> Float[Tensor, "n c H W"]:
        """One image in [-1, 1] for each prompt, on the CPU of every rank, in the prompts' order.

        Sharded models communicate in every forward, so all ranks draw equally many: the last
        share is filled up with repeats that are thrown away.

        A picture that is not finite is black, and an error in the log that names its prompt and
        the step: drawing shows a run, it does not end it.
        """
        was_training = self.model.training
        self.model.eval()
        share = -(-len(prompts) // self.dims.data_degree)
        mine = [min(self.dims.data_rank * share + i, len(prompts) - 1) for i in range(share)]
        drawn, broken = [], []
        for at in range(0, share, self.batch_size):
            indices = mine[at : at + self.batch_size]
            watch = FirstNotFinite()
            images = generate(
                self.model,
                self.encoders.codec,
                self.encoders.encode_captions,
                self.geometry,
                [prompts[i] for i in indices],
                indices,
                settings,
                negative_prompt=negative_prompt,
                device=self.encoders.device,
                on_step=watch,
            )
            drawn.append(images)
            broken.append(watch.first)
        self.model.train(was_training)
        images = self._of_all_ranks(torch.cat(drawn))[: len(prompts)]
        first = self._of_all_ranks(torch.cat(broken))[: len(prompts)]
        bad = images.isnan().flatten(1).any(1)
        if torch.distributed.get_rank() == 0:
            for i in map(int, bad.nonzero().flatten()):
                logger.error(_not_finite(i, prompts[i], int(first[i]), settings.steps))
        return images.masked_fill(bad.view(-1, 1, 1, 1), -1.0)

    def _of_all_ranks(self, mine: Tensor) -> Tensor:
        """The rows of every data rank, one after another, on the CPU."""
        if (group := self.dims.data_group) is None:
            return mine.cpu()
        gathered = [torch.empty_like(mine) for _ in range(self.dims.data_degree)]
        torch.distributed.all_gather(gathered, mine.contiguous(), group=group)
        return torch.cat(gathered).cpu()


def _not_finite(number: int, prompt: str, step: int, steps: int) -> str:
    where = f"from denoising step {step} of {steps} on" if step else "once decoded"
    return f"Picture {number} of {prompt!r} is not finite {where}; it is drawn black"


def save_grid(
    images: Float[Tensor, "n c H W"],
    path: Path,
    columns: int,
    settings: SampleSettings,
    **facts: str | int | float,
) -> Tensor:
    """Write a grid with its settings in the metadata.

    Returns:
        the grid's pixels, uint8 [H, W] or [H, W, 3], for TensorBoard.
    """
    sheet = image_grid([to_pil(image) for image in images], columns)
    save_picture(sheet, path, {**settings.facts(), **facts})
    return torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(
        sheet.height, sheet.width, *(() if sheet.mode == "L" else (3,))
    )
