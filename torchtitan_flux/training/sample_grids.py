"""Grids of pictures during training: a row for each prompt, the same noise every time."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torchtitan_flux.torchtitan_shim  # noqa: F401  (before torchtitan)

import numpy as np
import torch
from PIL import Image
from torchtitan.tools.logging import logger

from torchtitan_flux.collectives import from_rank_0
from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.files import disk_full
from torchtitan_flux.image_file import save_picture
from torchtitan_flux.sampling.generate import SampleSettings, image_grid, to_pil
from torchtitan_flux.training.ema import Weights
from torchtitan_flux.training.hooks import Hook
from torchtitan_flux.training.image_sampler import ImageSampler
from torchtitan_flux.training.metrics import FluxMetrics


class SampleGrids(Hook):
    """Draws them at the steps that `[sampling]` names.

    Args:
        metrics: gets the pictures, and takes the time out of the throughput.
        weights: which are drawn with; an average's grid has its name in its own.
        on_begin: called with the step before its grids are drawn.
    """

    def __init__(
        self,
        config: FluxJobConfig,
        sampler: ImageSampler,
        settings: SampleSettings,
        metrics: FluxMetrics,
        weights: Sequence[Weights],
        on_begin: Callable[[int], None],
    ):
        self.config = config
        self.sampler = sampler
        self.settings = settings
        self.metrics = metrics
        self.weights = weights
        self.on_begin = on_begin

    def acts_after(self, step: int) -> bool:
        return step % self.config.sampling.freq == 0 or step == self.config.training.steps

    def after_step(self, step: int) -> None:
        if self.acts_after(step):
            self.draw(step)

    def resumed_when_finished(self, step: int) -> None:
        """It may have been killed after its last checkpoint and before its last grid."""
        if not from_rank_0(lambda: all(path.exists() for path in self.paths(step))):
            self.draw(step)

    def results(self, step: int) -> list[str]:
        path = self.paths(step)[0]
        return [f"grid: {path}"] if path.exists() else []

    def paths(self, step: int) -> list[Path]:
        """The grids of a step, one for each set of weights."""
        folder = Path(self.config.job.dump_folder) / self.config.sampling.folder
        return [folder / f"step-{step}{name and f'-{name}'}.png" for name, _ in self.weights]

    def draw(self, step: int) -> None:
        """Draw and write the grids of a step; collective."""
        self.on_begin(step)
        s = self.config.sampling
        prompts = [prompt for prompt in s.prompts for _ in range(s.images_per_prompt)]
        with self.metrics.pause():
            for (name, applied), path in zip(self.weights, self.paths(step), strict=True):
                with applied():
                    images = self.sampler.sample(prompts, self.settings)
                if torch.distributed.get_rank() == 0:
                    self._write([to_pil(image) for image in images], step, name, path)

    def _write(self, images: Sequence[Image.Image], step: int, name: str, path: Path) -> None:
        grid = image_grid(images, self.config.sampling.images_per_prompt)
        facts = {
            **self.settings.facts(),
            "prompts": json.dumps(self.config.sampling.prompts, ensure_ascii=False),
            "step": step,
            "flavor": self.config.model.flavor,
            **({"weights": name} if name else {}),
        }
        try:
            save_picture(grid, path, facts)
        except OSError as error:  # a full disk must not end the run here
            why = disk_full(error, path.parent) or error
            logger.error(f"{path} could not be written ({why}); training goes on without it")
            return
        self.metrics.log_image(f"samples/{name}" if name else "samples", np.asarray(grid), step)
